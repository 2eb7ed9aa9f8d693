"""Whether an exported graph gives what torch gives; what does not agree is no bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitrine.models.bundle.layout import (
    DETAILS,
    DETAILS_INPUT,
    REPLACED_INPUT,
    REPLACEMENT_OUTPUTS,
    VISION_OUTPUTS,
)
from vitrine.models.clip.loading import Clip
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.onnx_file import ExportError
from vitrine.models.graph.replacement import ReplacementGraph

TOLERANCE = 1e-4  # relative to the largest value of an output, torch against ONNX Runtime
ADDITIVITY = 1e-5  # rows against embedding, unit norm


def check_vision(clip: Clip, graph: AttributionGraph, path: Path) -> None:
    """Raise `ExportError` unless the ONNX file gives what torch gives, for batches of 1 and 5.

    Embedding against open_clip's own `encode_image`; rows against the embedding they must add up to; every output
    against the torch module. A feature may be active in one and not in the other only where it ties with the edge of
    its layer's budget or with its threshold; what is made of the features is then compared on the other images.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    names, compared = (*VISION_OUTPUTS, *DETAILS), 0
    for batch in (1, 5):
        pixels = torch.randn(batch, 3, *clip.tower.image_size, generator=generator)
        with torch.no_grad():
            torch_outputs = dict(zip(names, (o.numpy() for o in graph(pixels)), strict=True))
            plain = clip.model.encode_image(pixels, normalize=True).numpy()
        feeds = {"pixels": pixels.numpy(), DETAILS_INPUT: np.array(True)}
        found = dict(zip(names, session.run(names, feeds), strict=True))
        _check_close("embedding against open_clip's encode_image", found["embedding"], plain, TOLERANCE)
        _check_close("sum of rows against the embedding", found["rows"].sum(1), found["embedding"], ADDITIVITY)
        same = _check_code(found, torch_outputs, graph)
        compared += int(same.sum())
        for name in names:
            if name.startswith("feature_") or not same.any():
                continue
            _check_close(f"{name} at batch {batch}", found[name][same], torch_outputs[name][same], TOLERANCE)
    if not compared:
        raise ExportError("in every image a feature ties with the edge of its budget: nothing could be compared")


def check_replacement(clip: Clip, graph: ReplacementGraph, path: Path) -> None:
    """Raise `ExportError` unless replacement.onnx gives open_clip's embedding where nothing is replaced, and torch's
    outputs whatever is.

    Where a feature ties with the edge of its budget torch and ONNX Runtime may choose differently, and all that follows
    differs: so it is the better half of the images that must agree.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(graph.layers, 2, generator=generator) < 0.5
    for batch, replaced in ((1, none_replaced(graph.layers)), (5, none_replaced(graph.layers)), (5, some), (5, ~some)):
        pixels = torch.randn(batch, 3, *clip.tower.image_size, generator=generator)
        feeds = {"pixels": pixels.numpy(), REPLACED_INPUT: replaced.numpy()}
        found = session.run(REPLACEMENT_OUTPUTS, feeds)
        with torch.no_grad():
            expected = [output.numpy() for output in graph(pixels, replaced)]
            plain = clip.model.encode_image(pixels, normalize=True).numpy()
        if not replaced.any():
            _check_close("replacement.onnx with nothing replaced", found[0], plain, TOLERANCE)
        for name, ours, theirs in zip(REPLACEMENT_OUTPUTS, found, expected, strict=True):
            off = np.abs(ours - theirs).reshape(batch, -1).max(1)
            better = off <= np.median(off)
            _check_close(f"{name} under replacement", ours[better], theirs[better], TOLERANCE)


def none_replaced(layers: int) -> Tensor:
    """What replaces no MLP: [L, 2]."""
    return torch.zeros(layers, 2, dtype=torch.bool)


def check_text(text: nn.Module, tokens: Tensor, path: Path) -> None:
    """Raise `ExportError` unless text.onnx gives torch's embeddings."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (tokens[:1], tokens[:5]):
        with torch.no_grad():
            expected = text(batch).numpy()
        _check_close(
            "text embedding", session.run(["text_embedding"], {"tokens": batch.numpy()})[0], expected, TOLERANCE
        )


def _check_close(what: str, found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    worst = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))
    if not worst <= tolerance:
        raise ExportError(f"{what}: relative difference {worst:.2e}, allowed {tolerance:.0e}")


def _check_code(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], graph: AttributionGraph
) -> NDArray[np.bool_]:
    """Same activations, and same features but for ties; returns the images that have the very same features [B]."""
    allowed = TOLERANCE * float(np.abs(expected["feature_values"]).max())
    ours, theirs = _active(found), _active(expected)
    same = np.ones(len(ours), dtype=bool)
    for image, layer in np.ndindex(len(ours), graph.layers):
        pair = ours[image][layer], theirs[image][layer]
        for feature in pair[0].keys() | pair[1].keys():
            if feature in pair[0] and feature in pair[1]:
                off = abs(pair[0][feature] - pair[1][feature])
            else:
                has, lacks = pair if feature in pair[0] else pair[::-1]
                off = abs(_rank(graph, layer, feature, has[feature]) - _edge(graph, layer, lacks))
                same[image] = False
            if not off <= allowed:
                raise ExportError(
                    f"feature {feature} of layer {layer}: activation differs by {off:.2e}, allowed {allowed:.0e}"
                )
    return same


def _rank(graph: AttributionGraph, layer: int, feature: int, activation: float) -> float:
    """What the graph chooses features by, the largest first: 0 or less never gets a place in use."""
    if graph.threshold is not None:
        return activation - float(graph.threshold[layer, feature])
    return abs(activation)


def _edge(graph: AttributionGraph, layer: int, active: dict[int, float]) -> float:
    """The rank that a feature beyond `active` would have needed: the last one's if all places are in use, else 0."""
    if len(active) < graph.places[layer]:
        return 0.0
    return min(_rank(graph, layer, feature, activation) for feature, activation in active.items())


def _active(outputs: dict[str, np.ndarray]) -> list[list[dict[int, float]]]:
    """Active features and their activations, of every image and layer."""
    indices, values = outputs["feature_indices"], outputs["feature_values"]
    return [
        [{int(f): float(z) for f, z in zip(*layer, strict=True) if z != 0} for layer in zip(*image, strict=True)]
        for image in zip(indices, values, strict=True)
    ]
