"""Parity of the graphs of residual SAEs: they must give torch's results and add up, or there is no bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from vitrine.models.account.residual import ResidualTrace
from vitrine.models.bundle.layout import RESIDUAL_HELD, RESIDUAL_TRACE, RESIDUAL_TRACE_OUTPUTS, residual_file
from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.residual_sae import ResidualSaes
from vitrine.models.export.parity import TOLERANCE, check_close, check_codes
from vitrine.models.graph.gated_trace import GatedTraceGraph
from vitrine.models.graph.onnx_file import ExportError
from vitrine.models.graph.residual import FeatureSourcesGraph, LogitSourcesGraph
from vitrine.models.precision.sessions import session_options

BlockGraph = FeatureSourcesGraph | LogitSourcesGraph


def check_residual(
    clip: Clip, saes: ResidualSaes, trace: GatedTraceGraph, blocks: Sequence[BlockGraph], bundle: Path
) -> None:
    """Raise `ExportError` unless the trace gives open_clip's embedding and torch's tensors, up to ties of features, and
    each block's graph torch's parts from the same trace, which sum to a feature's activation or a direction's product
    with the stream."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(5, 3, *clip.tower.image_size, generator=generator)
    names = RESIDUAL_TRACE_OUTPUTS
    outputs = dict(zip(names, _session(bundle / RESIDUAL_TRACE).run(names, {"pixels": pixels.numpy()}), strict=True))
    with torch.no_grad():
        expected = dict(zip(names, (part.numpy() for part in trace(pixels)), strict=True))
        embedding = clip.model.encode_image(pixels, normalize=True).numpy()
    check_close(f"{RESIDUAL_TRACE} against open_clip's encode_image", outputs["embedding"], embedding)
    for name in names:
        if name not in ("indices", "values"):
            check_close(f"{name} of {RESIDUAL_TRACE}", outputs[name], expected[name])
    check_codes(RESIDUAL_TRACE, outputs, expected, saes.features)
    image = ResidualTrace.from_batch(outputs, 0)
    last = len(blocks) - 1
    for block, graph in enumerate(blocks):
        start, totals = _directions(image, clip, generator) if block == last else _features(image, block)
        feeds = start | held_by(image, block)
        session = _session(bundle / residual_file(block))
        found = session.run([node.name for node in session.get_outputs()], feeds)
        with torch.no_grad():
            theirs = graph(*map(torch.from_numpy, feeds.values()))
        for node, ours, part in zip(session.get_outputs(), found, theirs, strict=True):
            check_close(f"{node.name} of {residual_file(block)}", ours, part.numpy())
        sums = sum(part.reshape(len(part), -1).sum(1, dtype=np.float64) for part in found)
        gross = sum(np.abs(part.reshape(len(part), -1)).sum(1, dtype=np.float64) for part in found)
        missed = np.abs(sums - totals).max()
        if not missed <= TOLERANCE * np.max(gross):
            raise ExportError(f"the parts of {residual_file(block)} differ from their sum by {missed:.1e}")


def held_by(trace: ResidualTrace, block: int) -> dict[str, Any]:
    """An image's trace as inputs of the graph that goes back through a block."""
    return dict(zip(RESIDUAL_HELD, trace.through(block), strict=False))  # below block 0 there is no code


def _features(image: ResidualTrace, block: int) -> tuple[dict[str, Any], Any]:
    """(inputs, activations) of the largest feature of three tokens."""
    assert image.indices is not None
    assert image.values is not None
    assert image.deviations is not None
    token = np.array([0, 1, image.values.shape[1] - 1])
    place = np.abs(image.values[block, token]).argmax(-1)
    start = {"feature": image.indices[block, token, place], "token": token, "scales": image.deviations[block]}
    return start, image.values[block, token, place]


def _directions(image: ResidualTrace, clip: Clip, generator: torch.Generator) -> tuple[dict[str, Any], Any]:
    """(inputs, logits without ln_post's beta) of three random labels."""
    fold, beta = (part.numpy() for part in clip.tower.fold())
    labels = torch.randn(3, clip.tower.embedding, generator=generator).numpy()
    logits, of_beta = image.logits(labels, beta, clip.logit_scale)
    return {"direction": image.starts(labels, fold, clip.logit_scale)}, logits - of_beta


def _session(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(file, session_options(), providers=["CPUExecutionProvider"])
