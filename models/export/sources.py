"""Writes what source accounts need into a bundle: the graphs, and the average picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitrine.models.bundle.layout import (
    BASELINE,
    BASELINE_STREAM,
    HEADS,
    HELD,
    SCORES_HELD,
    SCORES_OUTPUTS,
    SOURCES_OUTPUTS,
    STARTS,
    TRACE_OUTPUTS,
    given,
)
from vitrine.models.clip.loading import Clip
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.average import mean_code, mean_stream
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.export.parity import check_scores, check_sources
from vitrine.models.graph.onnx_file import save_onnx, to_onnx
from vitrine.models.graph.scores import ScoresGraph
from vitrine.models.graph.sources import SourcesGraph, written_by
from vitrine.models.graph.trace import TraceGraph


def write_sources(
    bundle: Path, clip: Clip, clt: CrossLayerTranscoder | None, tables: torch.dtype, images: Sequence[Tensor]
) -> None:
    """Write the graphs of source accounts and of attention scores, checked against torch, and the average picture of
    `images` (batches of normalised pixels), if there are any and a CLT. Tensors that vision.onnx or replacement.onnx
    have are shared.

    Raises `ExportError`.
    """
    beside = [file for file in (bundle / "vision.onnx", bundle / "replacement.onnx") if file.exists()]
    check_sources(clip, *export_graphs(bundle, clip.tower, clt, tables, beside), bundle)
    check_scores(clip, export_scores(bundle, clip.tower, beside), bundle)
    if clt and images:
        average = mean_code(clip.tower, clt, images)
        for name, table in zip(BASELINE, (average, written_by(clt, average)), strict=True):
            np.save(bundle / name, table.numpy())
        np.save(bundle / BASELINE_STREAM, mean_stream(clip.tower, images).numpy())


def export_graphs(
    folder: Path, tower: Tower, clt: CrossLayerTranscoder | None, tables: torch.dtype, beside: Sequence[Path] = ()
) -> tuple[TraceGraph, SourcesGraph]:
    """Write trace.onnx and sources.onnx, unchecked, and return them in torch. beside: models to share tensors with."""
    trace, sources = TraceGraph(tower, clt, tables).eval(), SourcesGraph(tower, clt, tables).eval()
    pixels = torch.zeros(2, 3, *tower.image_size)
    outputs = given(TRACE_OUTPUTS, features=clt is not None)
    save_onnx(to_onnx(trace, {"pixels": pixels}, outputs), folder / "trace.onnx", beside)

    with torch.no_grad():
        of_image = {name: part[0] for name, part in zip(outputs, trace(pixels), strict=True)}
    held = {name: of_image[name] for name in HELD if name in of_image}
    start = (torch.zeros(2, tower.width), *(torch.zeros(2, dtype=torch.int64) for _ in STARTS[1:]))
    directions = torch.export.Dim("directions")
    exported = to_onnx(
        sources,
        dict(zip(STARTS, start, strict=True)) | held,
        given(SOURCES_OUTPUTS, features=clt is not None),
        dynamic={name: {0: directions} for name in STARTS},
    )
    save_onnx(exported, folder / "sources.onnx", [*beside, folder / "trace.onnx"])
    return trace, sources


def export_scores(folder: Path, tower: Tower, beside: Sequence[Path] = ()) -> ScoresGraph:
    """Write scores.onnx beside trace.onnx and sources.onnx, unchecked, and return it in torch."""
    scores = ScoresGraph(tower).eval()
    layers, heads, tokens, width = tower.layers, scores.heads, tower.tokens, tower.width
    shapes = ((layers, heads, tokens, tokens), (layers, tokens), (tokens, width), (layers, tokens, width))
    inputs = {name: torch.zeros(2, dtype=torch.int64) for name in HEADS}
    inputs |= {name: torch.ones(shape) for name, shape in zip(SCORES_HELD, shapes, strict=True)}
    chosen = torch.export.Dim("heads")
    exported = to_onnx(scores, inputs, SCORES_OUTPUTS, dynamic={name: {0: chosen} for name in HEADS})
    save_onnx(exported, folder / "scores.onnx", [*beside, folder / "trace.onnx", folder / "sources.onnx"])
    return scores
