"""Cost of a source account: trace and sources graphs compared with plain CLIP, one image, in one paired run.

    python loadtests/sources.py --quick
    python loadtests/sources.py --shape b32 --features 6144 --k 32 --pairs 20
    python loadtests/sources.py --shape b16 --features 6144 --k 32 --pairs 10 --json rows.json

Weights and pixels are random: speed does not depend on them, except on how many tokens share a feature. In each round
every variant runs once, in random order; figures are medians, ratios are medians of the rounds' ratios to plain CLIP.

    plain                  CLIP's image encoder as an ONNX graph
    trace                  the forward half: all tokens' codes, attention weights, MLP outputs
    sources, n targets     the backward half, from a trace
    account, n targets     both, and the account in numpy

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
import torch
import typer

from engine import LOGIT_SCALE, Case, Shape, load, plain_graphs, report, rounds, rows, session
from vitrine.models.account.sources import accounts
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.models.export.sources import export_graphs
from vitrine.service.engine.processors import available_processors
from vitrine.service.engine.runtime import PROVIDERS, Runtime
from vitrine.service.engine.sources import SourceGraphs

TARGETS = (1, 10)


def export(folder: Path, shape: Shape, features: int, k: int) -> None:
    """trace.onnx and sources.onnx of a random CLT for this shape."""
    model = load(shape)
    tower = Tower(model.visual)
    budget = (k,) * tower.layers
    clt = CrossLayerTranscoder(Architecture(tower.layers, tower.width, features, budget, budget))
    clt.initialise(torch.Generator().manual_seed(0))
    clt.requires_grad_(False)
    folder.mkdir(parents=True, exist_ok=True)
    export_graphs(folder, tower, clt, torch.float16)


class Unchecked(SourceGraphs):
    """Graphs without a bundle: there is no manifest that they could be compared with."""

    def check(self) -> None:
        """As `GraphsOnFirstUse`."""


def variants(folder: Path, plain: Path, shape: Shape, threads: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    tower = Tower(load(shape).visual)
    fold, beta = (part.numpy() for part in tower.fold())
    pixels = np.random.default_rng(0).standard_normal((1, 3, *tower.image_size), np.float32)
    baseline = session(plain / "fp32.onnx", "cpu", threads)
    shape_of = SimpleNamespace(layers=tower.layers, width=tower.width)
    bundle: Any = SimpleNamespace(
        path=folder,
        fold=fold,
        manifest=SimpleNamespace(logit_scale=LOGIT_SCALE, shape=shape_of, has_features=True),
        has_scores=False,
        check_unchanged=lambda: None,
    )
    runtime = Runtime(PROVIDERS["cpu"], "fp32", threads, {PROVIDERS["cpu"]: {}}, {})
    served = Unchecked(bundle, runtime)  # as the service runs them
    labels = np.random.default_rng(1).standard_normal((max(TARGETS), fold.shape[1]), np.float32)
    labels /= np.linalg.norm(labels, axis=1, keepdims=True)

    def account(count: int) -> object:
        made = accounts(*served.run(pixels[0], labels[:count]), labels[:count], beta, LOGIT_SCALE)
        return [sources.by_feature() for sources in made]

    traced = served.trace(pixels[0])
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: baseline.run(["embedding"], {"pixels": pixels}),
        "trace": partial(served.trace, pixels[0]),
    }
    for number in TARGETS:
        name = f"{number} target{'s' * (number > 1)}"
        runs[f"sources, {name}"] = partial(served.of_directions, traced, labels[:number])
        runs[f"account, {name}"] = partial(account, number)
    return runs


def main(
    shape: Annotated[Shape, typer.Option(help="Shape of the CLIP.")] = Shape.B32,
    features: Annotated[int, typer.Option(min=1, help="Number of features per layer.")] = 6144,
    k: Annotated[int, typer.Option(min=1, help="Number of active features per token and layer.")] = 32,
    pairs: Annotated[int, typer.Option(min=1, help="Number of rounds; in each, every variant runs once.")] = 20,
    threads: Annotated[int, typer.Option(min=0, help="Threads of an inference; 0: all processors.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use a small shape and few rounds, to check that it runs.")
    ] = False,
    cache: Annotated[Path, typer.Option(help="Folder in which graphs are kept.")] = Path("build/benchmark"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Time source accounts compared with plain CLIP. Example: python loadtests/sources.py --shape b32 --pairs 20"""
    if quick:
        shape, features, k, pairs = Shape.TINY, 64, 8, min(pairs, 2)
    threads = threads or available_processors()[0]
    plain = plain_graphs(cache, shape)
    folder = cache / f"{shape}-{features}-{k}-sources"
    if not (folder / "sources.onnx.data").exists():
        export(folder, shape, features, k)
    case = Case(shape, features, k, 1)
    found = list(rows(case, rounds(variants(folder, plain, shape, threads), pairs, f"{shape}, F = {features:,}")))
    report(found, threads, json_file)


if __name__ == "__main__":
    typer.run(main)
