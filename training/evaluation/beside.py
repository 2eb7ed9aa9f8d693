"""Residual SAEs and a Cross-Layer Transcoder of the same CLIP, side by side on the same images: how well each stands in
for the network, whether what its account names made the prediction, how large its circuits are, and what it costs.

The CLT's usual values are means over the train images whose medians are the SAEs' (`training.evaluation.curves`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from vitrine.models.bootstrap import Bootstrap
from vitrine.models.bundle.sealing import file_sha256
from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.average import mean_code
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.residual_sae import ResidualSaes
from vitrine.models.progress import Progress
from vitrine.training.checkpoint import weights_file
from vitrine.training.data.held_out import HeldOut
from vitrine.training.evaluation.circuits import Circuits, CltCircuits, SaeCircuits, circuit_figures
from vitrine.training.evaluation.curves import Curves, node_faithfulness, rightly_classified
from vitrine.training.evaluation.evaluate import open_checkpoint
from vitrine.training.evaluation.measure import AT_ONCE, Plan, measure
from vitrine.training.evaluation.nodes import CltNodes
from vitrine.training.evaluation.results import NodeFaithfulness
from vitrine.training.evaluation.sae_results import Beside, CircuitFigures, SaeResults, Side

CIRCUITS = 4  # images


def with_beside(
    results: SaeResults,
    clip: Clip,
    saes: ResidualSaes,
    checkpoint: Path,
    images: HeldOut,
    label_embeddings: Tensor,
    usual: HeldOut | None,
    curves: int,
    console: Console,
) -> SaeResults:
    """The results of residual SAEs, with the CLT of a checkpoint beside them.

    Args:
        saes: on the CLIP's device, as those of `results`.
        images, label_embeddings, curves: as `results` were measured with.
        usual: train images over which the CLT's means are taken; None: there are no curves.

    Raises `CheckpointError` if the CLT was trained on another CLIP, or the checkpoint is of another kind.
    """
    clt, meta = open_checkpoint(checkpoint, clip)
    clt, seed = clt.to(clip.tower.visual.proj.device), results.seeds.bootstrap
    bootstrap, whole = Bootstrap(len(images), seed=seed), range(clt.layers)
    plan = Plan([whole], tokens=("all",))
    measured = measure(clip, clt, images, label_embeddings, plan, bootstrap, console, seed=seed)
    replaced = measured.cascades.figures(bootstrap)[1]
    nodes: NodeFaithfulness | None = None
    circuits: tuple[CircuitFigures | None, CircuitFigures | None] = None, None
    if results.nodes and usual:
        kinds = [CltNodes(clip, clt, _mean(clip, clt, usual, console), seed)]
        nodes = node_faithfulness(clip, kinds, images, label_embeddings, curves, console, seed=seed)
        circuits = _circuits(clip, saes, clt, images, label_embeddings, seed, console)
    everywhere = measured.reconstruction.figures()["all"]
    ours = Side(
        name=results.recipe.name,
        checkpoint_sha256=results.checkpoint_sha256,
        parameters=saes.architecture.parameters,
        features=sum(saes.architecture.features),
        l0=results.reconstruction["all"].l0,
        r2=results.reconstruction["all"].r2.value,
        replaced=results.cascade(0, saes.layers - 1, "all") if results.cascades else None,
        inserted=_inserted(results.nodes, "relevance"),
        circuits=circuits[0],
    )
    theirs = Side(
        name=meta.recipe.name,
        checkpoint_sha256=file_sha256(weights_file(checkpoint, meta)),
        parameters=clt.architecture.parameters,
        features=clt.layers * clt.features,
        l0=everywhere.l0,
        r2=everywhere.r2.value,
        replaced=replaced[0] if replaced else None,
        inserted=_inserted(nodes, "sources_mean"),
        circuits=circuits[1],
    )
    return results.model_copy(update={"beside": Beside(saes=ours, clt=theirs, nodes=nodes)})


def _mean(clip: Clip, clt: CrossLayerTranscoder, images: HeldOut, console: Console) -> Tensor:
    """Mean activations [L, 2, F]."""
    device = clip.tower.visual.proj.device
    with Progress(console) as progress:
        task = progress.task("means", len(images), "images")

        def batches() -> Iterator[Tensor]:
            for pixels, _ in images.batches():
                for few in pixels.to(device).split(AT_ONCE):
                    yield few
                    task.advance(len(few))

        return mean_code(clip.tower, clt, batches())


def _circuits(
    clip: Clip,
    saes: ResidualSaes,
    clt: CrossLayerTranscoder,
    images: HeldOut,
    label_embeddings: Tensor,
    seed: int,
    console: Console,
) -> tuple[CircuitFigures, CircuitFigures]:
    """Of the first images of the curves."""
    chooser = Curves(clip, label_embeddings, [])
    device, labels = clip.tower.visual.proj.device, label_embeddings.to(clip.tower.visual.proj)
    chosen = list(islice(rightly_classified(chooser.top1, images, CIRCUITS, device, seed), CIRCUITS))
    targets = [(pixels, labels[chooser.top1(pixels)] - labels.mean(0)) for pixels in chosen]
    kinds: tuple[Circuits, Circuits] = SaeCircuits(clip, saes), CltCircuits(clip, clt)
    with Progress(console) as progress:
        task = progress.task("circuits", 2 * len(targets), "circuits")

        def counted() -> Iterator[tuple[Tensor, Tensor]]:
            for target in targets:
                yield target
                task.advance(1)

        with torch.inference_mode():
            return circuit_figures(kinds[0], counted()), circuit_figures(kinds[1], counted())


def _inserted(measured: NodeFaithfulness | None, ranking: str, share: float = 0.8) -> float | None:
    """How many nodes, on the line between measured fractions, regain a share of the way from everything at its usual
    value to nothing."""
    if measured is None:
        return None
    curve = measured.curve(ranking)
    left = [point.above_mean.value for point in curve.insertion]
    goal = left[0] + share * (left[-1] - left[0])
    at = next(level for level, value in enumerate(left) if value >= goal)
    (x, y), (before, below) = ((measured.fractions[level], left[level]) for level in (at, at - 1))
    return curve.active * (before + (x - before) * (goal - below) / (y - below))
