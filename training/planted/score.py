"""How well a proposal is aimed at a planted cue: the rank of the cue's features in it, and groups before and after.

A proposal is a list of interventions (`models.interventions.spec`), the first the most wanted, as JSON; or an object
with such a list at `interventions`. It is made in the running network, on images that nobody has looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor

from vitrine.models.bundle.layout import ALWAYS
from vitrine.models.dictionary.residual_sae import ResidualSaes
from vitrine.models.errors import VitrineError
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.rerun import ChangedGraph, RerunGraph
from vitrine.models.graph.residual_rerun import ResidualRerunGraph
from vitrine.models.groups import Accuracy, Change, Judge
from vitrine.models.inputs.files import read_file
from vitrine.models.interventions.batch import stacked
from vitrine.models.interventions.changes import resolve
from vitrine.models.interventions.spec import Dictionary as Name
from vitrine.models.interventions.spec import Intervention
from vitrine.training.checkpoint import first_problem, latest, load_clt, load_residual_saes
from vitrine.training.evaluation.results import Part
from vitrine.training.planted.data import Row, grouped, read_table
from vitrine.training.planted.make import embeddings, load_planted, pixels, read_record
from vitrine.training.planted.network import TorchNetwork
from vitrine.training.planted.truth import Dictionary, Pair, Truth, find_truth

MOST_SHOWN = 10  # first proposals among which a feature of the cue counts as found
PAIRS = 64  # photos of test that the truth is found on
BATCH = 50  # images; the graphs account for [CLS] besides


class ProposalError(VitrineError, ValueError):
    """The proposal cannot be read; the message says why."""


class Score(Part):
    """Of one proposal."""

    interventions: int
    first_rank: int | None  # from 1: of the first feature of the cue among the proposed ones; None: there is none
    found: int  # features of the cue among the first `MOST_SHOWN`
    expected: float  # the same of features drawn at random
    before: Accuracy
    after: Accuracy
    change: Change
    closed: float | None  # share of the gap to the twin's worst group; None without a twin, or where there is no gap


class _Wrapped(BaseModel):
    interventions: tuple[Intervention, ...]


def read_proposal(file: Path) -> tuple[Intervention, ...]:
    """Raises `ProposalError`."""
    try:
        found: tuple[Intervention, ...] | _Wrapped = TypeAdapter(tuple[Intervention, ...] | _Wrapped).validate_json(
            read_file(file)
        )
    except ValidationError as error:
        raise ProposalError(f"{file} is no list of interventions: {first_problem(error)}") from error
    return found.interventions if isinstance(found, _Wrapped) else found


class Benchmark:
    """What `make` made, opened: one can score many proposals."""

    def __init__(self, out: Path) -> None:
        """Raises `CheckpointError` if `out` is not complete."""
        self.out, self.record = out, read_record(out)
        self.clip = load_planted(out)
        self._clt, self._cls_mean, _ = load_clt(latest(out / "clt"))
        self.dictionaries: dict[Name, Dictionary] = {"clt": self._clt}
        if self.record.recipe.residual is not None:
            self.dictionaries["residual"] = load_residual_saes(latest(out / "saes"))[0]
        self.rows = read_table(out / "data", "test")
        labels = embeddings(self.clip, self.record.recipe, self.record.classes)
        self.direction = self.clip.logit_scale * (labels[0] - labels[1])

    def truth(self, name: Name) -> Truth:
        """Which features of a dictionary carry the cue."""
        rows = self.rows[:: max(1, len(self.rows) // PAIRS)][:PAIRS]
        return find_truth(self.clip.tower, self.dictionaries[name], self._pairs(rows), self.direction)

    @torch.no_grad()
    def predicted(self, proposal: Sequence[Intervention]) -> NDArray[np.integer]:
        """[n] which of the two classes the images of test are taken for, with the proposal made in the running network.

        Raises `InterventionError`.
        """
        changes = resolve(proposal, self._network, "rerun")
        graph, margins = self._graphs[changes.dictionary], []
        for batch in self._batches([row.image for row in self.rows]):
            inputs = [torch.from_numpy(part) for part in stacked([changes] * len(batch)).values()]
            margins.append(graph(batch, *inputs)[ALWAYS.index("embedding")] @ self.direction)
        places: NDArray[np.integer] = (torch.cat(margins) <= 0).long().numpy()
        return places

    def score(self, proposal: Sequence[Intervention]) -> Score:
        """Raises `InterventionError`."""
        features = list(dict.fromkeys((i.dictionary, i.layer, i.index) for i in proposal if i.index is not None))
        truths = {name: self.truth(name) for name in {feature[0] for feature in features}}
        carriers = {(name, c.layer, c.index) for name, truth in truths.items() for c in truth.carriers}
        hits = [rank for rank, feature in enumerate(features, 1) if feature in carriers]
        shown = min(MOST_SHOWN, len(features))
        before, after = self.predicted(()), self.predicted(proposal)
        judge = Judge(grouped(self.rows, self.record.classes))
        was, now = judge.accuracy(before), judge.accuracy(after)
        twin = self.record.accuracy.get("twin")
        gap = twin.worst.value - was.worst.value if twin else 0.0
        return Score(
            interventions=len(proposal),
            first_rank=hits[0] if hits else None,
            found=sum(rank <= MOST_SHOWN for rank in hits),
            expected=shown * len(carriers) / max(1, sum(truth.features for truth in truths.values())),
            before=was,
            after=now,
            change=judge.change(before, after),
            closed=(now.worst.value - was.worst.value) / gap if gap > 0 else None,
        )

    @cached_property
    def _network(self) -> TorchNetwork:
        """Its means are those of the bundle."""
        data = self.out / "data"
        average = sorted(path.relative_to(data).as_posix() for path in data.glob("calibration/*/*.png"))
        return TorchNetwork(self.clip.tower, self.dictionaries, list(self._batches(average)))

    @cached_property
    def _graphs(self) -> dict[Name, ChangedGraph]:
        """The running network, by whose features are changed in it."""
        vision = AttributionGraph(self.clip.tower, self._clt, self._cls_mean, torch.float32).eval()
        graphs: dict[Name, ChangedGraph] = {"clt": RerunGraph(vision, self._clt, torch.float32).eval()}
        if isinstance(saes := self.dictionaries.get("residual"), ResidualSaes):
            graphs["residual"] = ResidualRerunGraph(vision, saes).eval()
        return graphs

    def _batches(self, images: Sequence[str]) -> Iterator[Tensor]:
        for at in range(0, len(images), BATCH):
            yield pixels(self.clip, self.out / "data", images[at : at + BATCH])

    def _pairs(self, rows: Sequence[Row]) -> Iterator[Pair]:
        for at in range(0, len(rows), 16):  # dense codes of all features are large
            part = rows[at : at + 16]
            own = pixels(self.clip, self.out / "data", [row.image for row in part])
            other = pixels(self.clip, self.out / "data", map(paired, part))
            drawn = torch.tensor([row.cue for row in part])[:, None, None, None]
            yield Pair(with_cue=torch.where(drawn, own, other), without=torch.where(drawn, other, own))


def paired(row: Row) -> str:
    """The same photo of test, with the cue where it has none, and without it where it has it."""
    return row.image.replace("test/", "pairs/", 1)
