"""Cost of a source account: trace and sources graphs beside plain CLIP, one image, in one paired run.

    python loadtests/sources.py --quick
    python loadtests/sources.py --shape b32 --features 6144 --k 32 --pairs 20
    python loadtests/sources.py --shape b16 --features 6144 --k 32 --pairs 10 --json rows.json

Weights and pixels are random: speed does not depend on them, but for how many tokens share a feature. In each round
every variant runs once, in random order; figures are medians, ratios are medians of the rounds' ratios to plain CLIP.

    plain                  CLIP's image encoder as an ONNX graph
    trace                  the forward half: all tokens' codes, attention weights, MLP outputs
    sources, n targets     the backward half, from a trace
    account, n targets     both, and the account in numpy

Graphs are kept in --cache between runs. The training environment is needed ('.[cpu,training,dev]').
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import vitrine  # noqa: F401  # first: it stops the libraries' telemetry

# isort: split
import numpy as np
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from engine import LOGIT_SCALE, Case, Shape, load, plain_graphs, rounds, rows, session
from vitrine.models.account.sources import Trace, accounts
from vitrine.models.bundle.layout import SOURCES_OUTPUTS, STARTS, TRACE_OUTPUTS
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.models.graph.onnx_file import save_onnx, to_onnx
from vitrine.models.graph.sources import SourcesGraph
from vitrine.models.graph.trace import TraceGraph
from vitrine.service.engine.processors import available_processors

TARGETS = (1, 10)


def export(folder: Path, shape: Shape, features: int, k: int) -> None:
    """trace.onnx and sources.onnx of a random CLT for this shape."""
    model = load(shape)
    tower = Tower(model.visual)
    budget = (k,) * tower.layers
    clt = CrossLayerTranscoder(Architecture(tower.layers, tower.width, features, budget, budget))
    clt.initialise(torch.Generator().manual_seed(0))
    clt.requires_grad_(False)
    pixels = torch.zeros(2, 3, *tower.image_size)
    trace, sources = (graph(tower, clt, torch.float16).eval() for graph in (TraceGraph, SourcesGraph))
    with torch.no_grad():
        outputs = dict(zip(TRACE_OUTPUTS, trace(pixels), strict=True))
    held = {name: outputs[name][0] for name in TRACE_OUTPUTS[3:]}
    zeros = torch.zeros(2, dtype=torch.int64)
    starts = dict(zip(STARTS, (torch.zeros(2, tower.width), zeros, zeros, zeros), strict=True))
    dynamic = {name: {0: torch.export.Dim("directions")} for name in STARTS}
    folder.mkdir(parents=True, exist_ok=True)
    save_onnx(to_onnx(trace, {"pixels": pixels}, TRACE_OUTPUTS), folder / "trace.onnx")
    del trace
    save_onnx(to_onnx(sources, starts | held, SOURCES_OUTPUTS, dynamic=dynamic), folder / "sources.onnx")


def variants(folder: Path, plain: Path, shape: Shape, threads: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    tower = Tower(load(shape).visual)
    fold, beta = (part.numpy() for part in tower.fold())
    pixels = np.random.default_rng(0).standard_normal((1, 3, *tower.image_size), np.float32)
    baseline, tracing, following = (
        session(path, "cpu", threads) for path in (plain / "fp32.onnx", folder / "trace.onnx", folder / "sources.onnx")
    )
    labels = np.random.default_rng(1).standard_normal((max(TARGETS), fold.shape[1]), np.float32)
    labels /= np.linalg.norm(labels, axis=1, keepdims=True)

    def trace() -> dict[str, Any]:
        return dict(zip(TRACE_OUTPUTS, tracing.run(list(TRACE_OUTPUTS), {"pixels": pixels}), strict=True))

    def follow(outputs: dict[str, Any], count: int) -> dict[str, Any]:
        start = Trace.from_batch(outputs, 0).starts(labels[:count], fold, LOGIT_SCALE).astype(np.float32)
        nothing = np.zeros(count, np.int64)
        at = (start, np.full(count, tower.layers), nothing, nothing)
        feeds = dict(zip(STARTS, at, strict=True)) | {name: outputs[name][0] for name in TRACE_OUTPUTS[3:]}
        return dict(zip(SOURCES_OUTPUTS, following.run(list(SOURCES_OUTPUTS), feeds), strict=True))

    def account(count: int) -> object:
        outputs = trace()
        found = follow(outputs, count)
        made = accounts(Trace.from_batch(outputs, 0), found, labels[:count], beta, LOGIT_SCALE)
        return [sources.by_feature() for sources in made]

    traced = trace()
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: baseline.run(["embedding"], {"pixels": pixels}),
        "trace": trace,
    }
    for number in TARGETS:
        name = f"{number} target{'s' * (number > 1)}"
        runs[f"sources, {name}"] = partial(follow, traced, number)
        runs[f"account, {name}"] = partial(account, number)
    return runs


def main(
    shape: Annotated[Shape, typer.Option(help="Of the CLIP.")] = Shape.B32,
    features: Annotated[int, typer.Option(min=1, help="Features a layer.")] = 6144,
    k: Annotated[int, typer.Option(min=1, help="Active features a token and layer.")] = 32,
    pairs: Annotated[int, typer.Option(min=1, help="Rounds in which every variant runs once.")] = 20,
    threads: Annotated[int, typer.Option(min=0, help="Of an inference; 0: all processors.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A small shape and few rounds, to see that it runs.")] = False,
    cache: Annotated[Path, typer.Option(help="Where graphs are kept.")] = Path("build/benchmark"),
    json_file: Annotated[Path | None, typer.Option("--json", help="The rows too, in this file.")] = None,
) -> None:
    """Time source accounts beside plain CLIP. Example: python loadtests/sources.py --shape b32 --pairs 20"""
    if quick:
        shape, features, k, pairs = Shape.QUICK, 256, 8, min(pairs, 2)
    threads = threads or available_processors()[0]
    plain = plain_graphs(cache, shape)
    folder = cache / f"{shape}-{features}-{k}-sources"
    if not (folder / "sources.onnx.data").exists():
        export(folder, shape, features, k)
    case = Case(shape, features, k, 1)
    found = list(rows(case, rounds(variants(folder, plain, shape, threads), pairs, f"{shape}, F = {features:,}")))
    table = Table("variant", "median ms", "to plain", box=None)
    for row in found:
        table.add_row(row["variant"], f"{row['median_ms']:.1f}", f"{row['ratio_to_plain']:.2f}")
    console = Console()
    console.print(table)
    console.print(f"{threads} threads; resident memory {psutil.Process().memory_info().rss / 1e9:.2f} GB")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
