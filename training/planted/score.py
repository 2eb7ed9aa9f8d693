"""How well a proposal is aimed at a planted cue: the rank of the cue's features in it, and groups before and after.

A proposal is a list of interventions (`models.interventions.spec`), the first the most wanted, as JSON; or an edit or
a report of `vitrine debias`, whose ranking is compared with the cue's features then. It is made as it says, else in the
running network, on images that nobody has looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.layout import ALWAYS, EVERY_OUTPUT
from vitrine.models.dictionary.residual_sae import ResidualSaes
from vitrine.models.errors import VitrineError
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.rerun import ChangedGraph, RerunGraph
from vitrine.models.graph.residual_rerun import ResidualRerunGraph
from vitrine.models.groups import Accuracy, Change, Judge
from vitrine.models.inputs.files import read_file
from vitrine.models.interventions.batch import stacked
from vitrine.models.interventions.changes import Changes, resolve
from vitrine.models.interventions.conditions import applied
from vitrine.models.interventions.direct import changed
from vitrine.models.interventions.edit import Condition
from vitrine.models.interventions.spec import Dictionary as Name
from vitrine.models.interventions.spec import Intervention, Mode
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


class DirectTables(NamedTuple):
    """`models.interventions.direct.Tables`."""

    directions: NDArray[np.floating]
    fold: NDArray[np.floating]
    beta: NDArray[np.floating]


class Named(BaseModel):
    """A feature."""

    layer: int
    index: int
    dictionary: Name = "clt"


class _Evidence(BaseModel):
    ranking: tuple[Named, ...] = ()


class Proposal(BaseModel):
    """What is scored; fields of an edit or a report that are not here do not matter."""

    interventions: tuple[Intervention, ...]
    mode: Mode = "rerun"
    condition: Condition | None = None
    ranking: tuple[Named, ...] = ()
    evidence: _Evidence = _Evidence()

    @property
    def features(self) -> list[tuple[Name, int, int]]:
        """Each once, the most wanted first: those of a ranking, or else those that are changed."""
        ranked = [(one.dictionary, one.layer, one.index) for one in self.ranking or self.evidence.ranking]
        changed = [
            (item.dictionary, item.layer, item.index)
            for item in self.interventions
            if item.layer is not None and item.index is not None
        ]
        return list(dict.fromkeys(ranked or changed))


def read_proposal(file: Path) -> Proposal:
    """Raises `ProposalError`."""
    try:
        found: tuple[Intervention, ...] | Proposal = TypeAdapter(tuple[Intervention, ...] | Proposal).validate_json(
            read_file(file)
        )
    except ValidationError as error:
        raise ProposalError(f"{file} is not a list of interventions: {first_problem(error)}") from error
    proposal = found if isinstance(found, Proposal) else Proposal(interventions=found)
    if proposal.condition is not None and not proposal.condition.compares:
        raise ProposalError(f"{file} has a condition on activations, but only conditions on predictions can be scored")
    return proposal


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
        self.labels = (self.clip.logit_scale * labels).numpy()  # [2, D]

    def truth(self, name: Name) -> Truth:
        """Which features of a dictionary carry the cue."""
        rows = self.rows[:: max(1, len(self.rows) // PAIRS)][:PAIRS]
        return find_truth(
            self.clip.tower,
            self.dictionaries[name],
            self._pairs(rows),
            torch.from_numpy(self.labels[0] - self.labels[1]),
        )

    def changes(self, proposal: Proposal) -> Changes:
        """Raises `InterventionError`."""
        return resolve(proposal.interventions, self._network, proposal.mode)

    def predicted(self, proposal: Proposal) -> NDArray[np.integer]:
        """[n] which of the two classes the images of test are taken for under a proposal.

        Raises `InterventionError`.
        """
        logits = self._logits(self.changes(proposal), proposal.mode)
        if proposal.condition is not None:
            logits = np.where(applied(proposal.condition, self._plain, logits)[:, None], logits, self._plain)
        places: NDArray[np.integer] = logits.argmax(-1)
        return places

    def score(self, proposal: Proposal) -> Score:
        """Raises `InterventionError`."""
        features = proposal.features
        truths = {name: self.truth(name) for name in {feature[0] for feature in features}}
        carriers = {(name, c.layer, c.index) for name, truth in truths.items() for c in truth.carriers}
        hits = [rank for rank, feature in enumerate(features, 1) if feature in carriers]
        shown = min(MOST_SHOWN, len(features))
        before, after = self._plain.argmax(-1), self.predicted(proposal)
        judge = Judge(grouped(self.rows, self.record.classes))
        was, now = judge.accuracy(before), judge.accuracy(after)
        twin = self.record.accuracy.get("twin")
        gap = twin.worst.value - was.worst.value if twin else 0.0
        return Score(
            interventions=len(proposal.interventions),
            first_rank=hits[0] if hits else None,
            found=sum(rank <= MOST_SHOWN for rank in hits),
            expected=shown * len(carriers) / max(1, sum(truth.features for truth in truths.values())),
            before=was,
            after=now,
            change=judge.change(before, after),
            closed=(now.worst.value - was.worst.value) / gap if gap > 0 else None,
        )

    @torch.no_grad()
    def _logits(self, changes: Changes, mode: Mode) -> NDArray[np.floating]:
        """[n, 2] of the images of test, with changes made."""
        run = self._directly if mode == "direct" else self._rerun
        batches = self._batches([row.image for row in self.rows])
        found: NDArray[np.floating] = np.concatenate([run(batch, changes) for batch in batches]) @ self.labels.T
        return found

    def _rerun(self, batch: Tensor, changes: Changes) -> NDArray[np.floating]:
        """Unit embeddings [B, D] of normalised pixels."""
        inputs = [torch.from_numpy(part) for part in stacked([changes] * len(batch)).values()]
        found: NDArray[np.floating] = self._graphs[changes.dictionary](batch, *inputs)[
            ALWAYS.index("embedding")
        ].numpy()
        return found

    def _directly(self, batch: Tensor, changes: Changes) -> NDArray[np.floating]:
        """Unit embeddings [B, D] of normalised pixels."""
        outputs = dict(zip(EVERY_OUTPUT, map(np.asarray, self._vision(batch)), strict=True))
        parts = [Decomposition.from_batch(outputs, image, with_details=True) for image in range(len(batch))]
        return np.stack([changed(one, changes, self._tables).embedding for one in parts])

    @cached_property
    def _plain(self) -> NDArray[np.floating]:
        """[n, 2] logits of the images of test."""
        return self._logits(resolve((), self._network, "rerun"), "rerun")

    @cached_property
    def _vision(self) -> AttributionGraph:
        return AttributionGraph(self.clip.tower, self._clt, self._cls_mean, torch.float32).eval()

    @cached_property
    def _tables(self) -> DirectTables:
        fold, beta = self.clip.tower.fold()
        return DirectTables(self._clt.directions().numpy(), fold.numpy(), beta.numpy())

    @cached_property
    def _network(self) -> TorchNetwork:
        """Its means are those of the bundle."""
        data = self.out / "data"
        average = sorted(path.relative_to(data).as_posix() for path in data.glob("calibration/*/*.png"))
        return TorchNetwork(self.clip.tower, self.dictionaries, list(self._batches(average)))

    @cached_property
    def _graphs(self) -> dict[Name, ChangedGraph]:
        """The running network, by whose features are changed in it."""
        vision = self._vision
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
