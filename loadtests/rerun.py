"""Cost of an intervention in the running network compared with plain CLIP and the vision graph, one image, paired runs.

    python loadtests/rerun.py --quick
    python loadtests/rerun.py --shape b32 --features 6144 --k 32 --edited 10 --pairs 20

Weights, pixels and changes are random: speed does not depend on them. In each round every variant runs once, in random
order; figures are medians, ratios are medians of the rounds' ratios to plain CLIP.

    plain                     CLIP's image encoder as an ONNX graph
    vision                    the graph of every prediction, with its account
    vision and components     the same with what interventions in direct mode need
    an edit in direct mode    the same, with n of the features active at [CLS] set to their mean
    rerun, n features         the network with n features of random layers changed at all tokens
    rerun, a row              with all features of a layer
    rerun, n directions       with n directions removed after every block

Graphs are kept in --cache between runs. This needs the training environment ('.[cpu,training,dev]').
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import vitrine  # noqa: F401  # first: it stops the libraries' telemetry

# isort: split
import numpy as np
import onnxruntime
import torch
import typer
from numpy.typing import NDArray

from engine import Case, Shape, load, plain_graphs, report, rounds, rows, session
from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.layout import (
    ALWAYS,
    DETAILS_INPUT,
    HEAD_COMPONENTS,
    ON_REQUEST,
    RERUN,
    RERUN_INPUTS,
    VISION_OUTPUTS,
)
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.models.export.rerun import export_rerun
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.onnx_file import save_onnx, to_onnx
from vitrine.models.graph.rerun import RerunGraph
from vitrine.models.graph.variants import preselect
from vitrine.models.interventions import direct
from vitrine.models.interventions.changes import Changes
from vitrine.service.engine.processors import available_processors


def export(folder: Path, shape: Shape, features: int, k: int) -> None:
    """vision.onnx and rerun.onnx of a random CLT for this shape."""
    tower = Tower(load(shape).visual)
    budget = (k,) * tower.layers
    clt = CrossLayerTranscoder(Architecture(tower.layers, tower.width, features, budget, budget))
    clt.initialise(torch.Generator().manual_seed(0))
    clt.requires_grad_(False)
    folder.mkdir(parents=True, exist_ok=True)
    vision = AttributionGraph(tower, clt, torch.zeros(tower.layers, tower.width), torch.float16).eval()
    pixels = {"pixels": torch.zeros(2, 3, *tower.image_size)}
    save_onnx(preselect(to_onnx(vision, pixels, ALWAYS, ON_REQUEST, DETAILS_INPUT)), folder / "vision.onnx")
    graph = RerunGraph(vision, clt, torch.float16).eval()
    export_rerun(graph, vision, [features] * tower.layers, folder / RERUN, [folder / "vision.onnx"])


def changed(tower: Tower, features: int, edited: int = 0, directions: int = 0, row: bool = False) -> dict[str, Any]:
    """The inputs of rerun.onnx besides pixels, for one image."""
    generator, layers, tokens = np.random.default_rng(0), tower.layers, tower.tokens
    of = np.full(features, layers // 2) if row else np.sort(generator.integers(0, layers, edited))
    indices = np.arange(features) if row else generator.choice(features, edited, replace=False)
    places = np.repeat(np.arange(1, layers + 1), directions)
    basis = generator.standard_normal((len(places), tower.width))

    def full(value: float, *shape: int) -> NDArray[np.float32]:
        return np.full((1, *shape, tokens), value, np.float32)

    parts = (
        *(of, indices, full(-1, len(of)), full(0.1, len(of))),
        *(places, (basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32)),
        *(full(-1, len(places)), full(0, len(places))),
        *(full(1, layers, tower.blocks[0].attn.num_heads), full(1, layers), full(1, layers)),
    )
    return dict(zip(RERUN_INPUTS, parts, strict=True))


def direct_edit(
    vision: onnxruntime.InferenceSession, feeds: dict[str, Any], case: Case, tower: Tower, edited: int
) -> Callable[[], object]:
    """The vision graph, and `edited` of the features that are active changed in what it gives."""
    generator, (layers, width, tokens) = np.random.default_rng(0), (tower.layers, tower.width, tower.tokens)
    fold, beta = (part.detach().numpy() for part in tower.fold())
    directions = generator.standard_normal((layers, case.features, width)).astype(np.float16)
    tables = SimpleNamespace(directions=directions, fold=fold, beta=beta)

    def parts() -> Decomposition:
        return Decomposition.from_batch(dict(zip(ALWAYS, vision.run(list(ALWAYS), feeds), strict=True)), 0)

    plain = parts()
    active = generator.choice(np.flatnonzero(plain.feature_values), edited, replace=False)
    of = active // plain.feature_values.shape[1]
    indices = plain.feature_indices.ravel()[active]
    inputs = changed(tower, case.features, edited) | {"layers": of, "indices": indices}
    one = {name: part[0] if part.shape[-1] == tokens else part for name, part in inputs.items()}
    changes = Changes(dictionary="clt", clt=np.ones(layers, np.float32), **one)
    return lambda: direct.changed(parts(), changes, tables)


def variants(folder: Path, plain: Path, case: Case, threads: int, edited: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    tower = Tower(load(case.shape).visual)
    pixels = {"pixels": np.random.default_rng(0).standard_normal((1, 3, *tower.image_size), np.float32)}
    baseline, vision, rerun = (
        session(path, "cpu", threads) for path in (plain / "fp32.onnx", folder / "vision.onnx", folder / RERUN)
    )

    def run(graph: onnxruntime.InferenceSession, names: tuple[str, ...], feeds: dict[str, Any]) -> Callable[[], object]:
        return partial(graph.run, list(names), pixels | feeds)

    asked, direct = ({DETAILS_INPUT: np.array(value)} for value in (False, True))
    return {
        "plain": run(baseline, ("embedding",), {}),
        "vision": run(vision, VISION_OUTPUTS, asked),
        "vision and components": run(vision, ALWAYS, asked),
        "an edit in direct mode": direct_edit(vision, pixels | asked, case, tower, edited),
        "vision, components, heads": run(vision, (*ALWAYS, HEAD_COMPONENTS), direct),
        "rerun, nothing": run(rerun, ALWAYS, changed(tower, case.features)),
        f"rerun, {edited} features": run(rerun, ALWAYS, changed(tower, case.features, edited)),
        "rerun, a row": run(rerun, ALWAYS, changed(tower, case.features, row=True)),
        "rerun, 5 directions": run(rerun, ALWAYS, changed(tower, case.features, directions=5)),
    }


def main(
    shape: Annotated[Shape, typer.Option(help="Shape of the CLIP.")] = Shape.B32,
    features: Annotated[int, typer.Option(min=1, help="Number of features per layer.")] = 6144,
    k: Annotated[int, typer.Option(min=1, help="Number of active features per token and layer.")] = 32,
    edited: Annotated[int, typer.Option(min=1, help="Number of features that are changed.")] = 10,
    pairs: Annotated[int, typer.Option(min=1, help="Number of rounds; in each, every variant runs once.")] = 20,
    threads: Annotated[int, typer.Option(min=0, help="Threads of an inference; 0: all processors.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use a small shape and few rounds, to check that it runs.")
    ] = False,
    cache: Annotated[Path, typer.Option(help="Folder in which graphs are kept.")] = Path("build/benchmark"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Time interventions compared with plain CLIP. Example: python loadtests/rerun.py --shape b32 --pairs 20"""
    if quick:
        shape, features, k, pairs = Shape.TINY, 64, 8, min(pairs, 2)
    threads = threads or available_processors()[0]
    plain, folder = plain_graphs(cache, shape), cache / f"{shape}-{features}-{k}-rerun"
    if not (folder / f"{RERUN}.data").exists():
        export(folder, shape, features, k)
    case = Case(shape, features, k, 1)
    runs = variants(folder, plain, case, threads, edited)
    found = list(rows(case, rounds(runs, pairs, f"{shape}, F = {features:,}")))
    report(found, threads, json_file)


if __name__ == "__main__":
    typer.run(main)
