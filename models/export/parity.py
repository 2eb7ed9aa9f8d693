"""Parity checks: an exported graph must give the same results as torch, or there is no bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrine.models.bundle.layout import (
    DETAILS_INPUT,
    HEADS,
    HELD,
    ON_REQUEST,
    REPLACED_INPUT,
    REPLACEMENT_OUTPUTS,
    SCORES_HELD,
    SCORES_OUTPUTS,
    STARTS,
)
from vitrine.models.clip.loading import Clip
from vitrine.models.clip.tokens import Converted
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.onnx_file import ExportError
from vitrine.models.graph.replacement import ReplacementGraph
from vitrine.models.graph.scores import ScoresGraph
from vitrine.models.graph.sources import SourcesGraph
from vitrine.models.graph.text import SHORTEST, TextGraph
from vitrine.models.graph.trace import TraceGraph
from vitrine.models.graph.vision import VisionGraph
from vitrine.models.precision.sessions import session_options
from vitrine.models.texts.reader import TextReader

TOLERANCE = 1e-4  # relative to the largest value of an output, torch against ONNX Runtime
ADDITIVITY = 1e-5  # sum of rows against the embedding, which has unit norm
TIES = 0.05  # most tokens of which a feature may tie with the edge of its budget
TEXTS, LENGTHS = 5, 12  # of the texts given; between the shortest and the longest


def check_vision(clip: Clip, graph: VisionGraph, path: Path) -> None:
    """Raise `ExportError` unless the ONNX file gives the same results as torch, for batch sizes 1 and 5.

    The embedding is compared with open_clip's own `encode_image`, the sum of rows with the embedding, and every output
    with the torch module. A feature may be active in only one of them if it ties with the edge of its layer's budget or
    with its threshold; outputs are then compared on the other images only.
    """
    session = onnxruntime.InferenceSession(path, session_options(), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    names, compared = (*graph.always, *ON_REQUEST), 0
    for batch in (1, 5):
        pixels = torch.randn(batch, 3, *clip.tower.image_size, generator=generator)
        with torch.no_grad():
            torch_outputs = dict(zip(names, (o.numpy() for o in graph(pixels)), strict=True))
            clip_embedding = clip.model.encode_image(pixels, normalize=True).numpy()
        feeds = {"pixels": pixels.numpy(), DETAILS_INPUT: np.array(True)}
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        check_close("embedding against open_clip's encode_image", outputs["embedding"], clip_embedding, TOLERANCE)
        check_close("sum of rows against the embedding", outputs["rows"].sum(1), outputs["embedding"], ADDITIVITY)
        same = np.ones(batch, dtype=bool)
        if isinstance(graph, AttributionGraph):
            same = _check_code(outputs, torch_outputs, graph)
        compared += int(same.sum())
        for name in names:
            if name.startswith("feature_") or not same.any():
                continue
            check_close(f"{name} at batch {batch}", outputs[name][same], torch_outputs[name][same], TOLERANCE)
    if not compared:
        raise ExportError(
            "the check could not compare anything: in every image two features tie at the limit of the budget; export "
            "again"
        )


def check_replacement(clip: Clip, graph: ReplacementGraph, path: Path) -> None:
    """Raise `ExportError` unless replacement.onnx gives open_clip's embedding where nothing is replaced, and torch's
    outputs for any replacement.

    Where a feature ties with the edge of its budget, torch and ONNX Runtime may choose differently, and all later
    results differ. So only the better half of the images must agree.
    """
    session = onnxruntime.InferenceSession(path, session_options(), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(graph.layers, 2, generator=generator) < 0.5
    none = no_replacement(graph.layers)
    for batch, replaced in ((1, none), (5, none), (5, random), (5, ~random)):
        pixels = torch.randn(batch, 3, *clip.tower.image_size, generator=generator)
        feeds = {"pixels": pixels.numpy(), REPLACED_INPUT: replaced.numpy()}
        outputs = session.run(REPLACEMENT_OUTPUTS, feeds)
        with torch.no_grad():
            expected = [output.numpy() for output in graph(pixels, replaced)]
            clip_embedding = clip.model.encode_image(pixels, normalize=True).numpy()
        if not replaced.any():
            check_close("replacement.onnx with nothing replaced", outputs[0], clip_embedding, TOLERANCE)
        for name, ours, theirs in zip(REPLACEMENT_OUTPUTS, outputs, expected, strict=True):
            error = np.abs(ours - theirs).reshape(batch, -1).max(1)
            better = error <= np.median(error)
            check_close(f"{name} under replacement", ours[better], theirs[better], TOLERANCE)


def check_sources(clip: Clip, trace: TraceGraph, sources: SourcesGraph, bundle: Path) -> None:
    """Raise `ExportError` unless trace.onnx gives open_clip's embedding and torch's tensors, up to ties of features,
    and sources.onnx torch's parts of random directions, and of pre-activations, from the same trace."""
    options, providers = session_options(), ["CPUExecutionProvider"]
    tracing, following = (
        onnxruntime.InferenceSession(bundle / file, options, providers=providers)
        for file in ("trace.onnx", "sources.onnx")
    )
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(5, 3, *clip.tower.image_size, generator=generator)
    names = [node.name for node in tracing.get_outputs()]
    outputs = dict(zip(names, tracing.run(names, {"pixels": pixels.numpy()}), strict=True))
    with torch.no_grad():
        expected = dict(zip(names, (part.numpy() for part in trace(pixels)), strict=True))
        embedding = clip.model.encode_image(pixels, normalize=True).numpy()
    check_close("trace.onnx against open_clip's encode_image", outputs["embedding"], embedding, TOLERANCE)
    for name in names:
        if name not in ("indices", "values"):
            check_close(f"{name} of trace.onnx", outputs[name], expected[name], TOLERANCE)
    layers, tokens = outputs["written"].shape[1:3]
    if "indices" in outputs:
        check_codes("trace.onnx", outputs, expected, trace.features)

    # Two directions after the last block, two at LN1 of a block, at one token and about the mean, two at encoders.
    starts = 6 if "indices" in outputs else 4
    layer = torch.tensor([layers, layers, layers - 1, layers // 2, 0, layers - 1])[:starts]
    direction = torch.randn(starts, clip.tower.width, generator=generator)
    token = torch.tensor([0, 0, tokens - 1, tokens + 1, 0, tokens - 1])[:starts]
    feature = torch.tensor([-1, -1, -1, -1, 0, 0])[:starts]
    held = {name: torch.from_numpy(outputs[name][0]) for name in HELD if name in names}
    start = dict(zip(STARTS, (direction, layer, token, feature), strict=True))
    feeds = {name: part.numpy() for name, part in (start | held).items()}
    found = [node.name for node in following.get_outputs()]
    with torch.no_grad():
        theirs = sources(*start.values(), *held.values())
    for name, ours, part in zip(found, following.run(found, feeds), theirs, strict=True):
        check_close(f"{name} of sources.onnx", ours, part.numpy(), TOLERANCE)


def check_scores(clip: Clip, scores: ScoresGraph, bundle: Path) -> None:
    """Raise `ExportError` unless scores.onnx gives torch's tensors for the heads of the first, a middle and the last
    layer, and its scores the attention weights of trace.onnx."""
    options, providers = session_options(), ["CPUExecutionProvider"]
    tracing, scoring = (
        onnxruntime.InferenceSession(bundle / file, options, providers=providers)
        for file in ("trace.onnx", "scores.onnx")
    )
    pixels = torch.randn(1, 3, *clip.tower.image_size, generator=torch.Generator().manual_seed(0))
    held = dict(zip(SCORES_HELD, tracing.run(SCORES_HELD, {"pixels": pixels.numpy()}), strict=True))
    held = {name: part[0] for name, part in held.items()}
    heads = [(layer, head) for layer in {0, scores.tower.layers // 2, scores.tower.layers - 1} for head in (0, -1)]
    layer, head = np.array(heads).T
    head = head % scores.heads
    feeds = dict(zip(HEADS, (layer, head), strict=True)) | held
    found = dict(zip(SCORES_OUTPUTS, scoring.run(SCORES_OUTPUTS, feeds), strict=True))
    with torch.no_grad():
        theirs = scores(*(torch.from_numpy(feed) for feed in feeds.values()))
    for name, part in zip(SCORES_OUTPUTS, theirs, strict=True):
        check_close(f"{name} of scores.onnx", found[name], part.numpy(), TOLERANCE)
    logits = found["queries"] @ found["keys"].swapaxes(1, 2) / np.sqrt(scores.head_width)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    check_close(
        "weights by scores.onnx, against trace.onnx", weights, held["attention_weights"][layer, head], TOLERANCE
    )


def check_codes(file: str, ours: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]], features: int) -> None:
    """Raise `ExportError` unless the codes of two traces are the same, up to ties of features."""
    codes = [_dense(of["indices"], of["values"], features) for of in (ours, theirs)]
    differs = np.abs(codes[0] - codes[1]).max(-1) > TOLERANCE * np.abs(codes[1]).max()  # [B, L, T]
    if differs.mean() > TIES:  # a sum over features is the same where two of them tie
        raise ExportError(f"{file} has different features than torch at {differs.mean():.1%} of the tokens")


def _dense(indices: NDArray[np.int64], values: NDArray[np.float32], features: int) -> NDArray[np.float32]:
    """[B, L, T, k] each -> [B, L, T, F]"""
    found = np.zeros((*values.shape[:-1], features), np.float32)
    token = np.arange(values[..., 0].size)[:, None]
    np.add.at(
        found.reshape(-1, features), (token, indices.reshape(-1, values.shape[-1])), values.reshape(len(token), -1)
    )
    return found


def no_replacement(layers: int) -> Tensor:
    """The mask [L, 2] that replaces no MLP."""
    return torch.zeros(layers, 2, dtype=torch.bool)


def check_text(clip: Clip, graph: TextGraph, tokens: Converted, texts: Sequence[str], path: Path) -> None:
    """Raise `ExportError` unless text.onnx gives open_clip's embeddings: of some of `texts` and, if it takes any
    length, of texts of all kinds of lengths, each alone at its own length and padded to that of a longer one.

    tokens: the exported tokenizer.
    """
    session = onnxruntime.InferenceSession(path, session_options(), providers=["CPUExecutionProvider"])
    some = list(texts[:TEXTS])
    padded = clip.tokenizer(some)
    with torch.no_grad():
        expected = clip.model.encode_text(padded, normalize=True).numpy()
    for batch in (1, len(some)):
        check_close("text embedding", _embed(session, padded[:batch]), expected[:batch], TOLERANCE)
    if not graph.any_length:
        return
    reader = tokens.reader()
    for text, row, (ids, _) in zip(some, expected, reader.read(some), strict=True):
        alone = _embed(session, torch.tensor([ids]))[0]
        check_close(f"text embedding of {text!r} at its own length", alone, row, TOLERANCE)
    lengths, padded = _texts_of_all_lengths(clip, reader, tokens.pad)
    with torch.no_grad():
        expected = clip.model.encode_text(padded, normalize=True).numpy()
    for row, length in enumerate(lengths):
        shorter = _embed(session, padded[: row + 1, :length])  # all up to this one
        check_close(f"text embeddings of up to {length} tokens", shorter, expected[: row + 1], TOLERANCE)


def _texts_of_all_lengths(clip: Clip, reader: TextReader, pad: int) -> tuple[list[int], Tensor]:
    """(lengths, ascending: the shortest, the longest and `LENGTHS` between; tokens [N, context] of texts that long)."""
    ((ids, _),) = reader.read(["a photo of two small dogs and one red ball " * clip.context])
    between = range(SHORTEST + 1, len(ids), max(1, len(ids) // LENGTHS))
    lengths = [SHORTEST, *between, len(ids)]
    tokens = torch.full((len(lengths), clip.context), pad)
    for row, length in enumerate(lengths):
        tokens[row, : length - 1], tokens[row, length - 1] = torch.tensor(ids[: length - 1]), ids[-1]
    return lengths, tokens


def _embed(session: onnxruntime.InferenceSession, tokens: Tensor) -> NDArray[np.float32]:
    return session.run(["text_embedding"], {"tokens": tokens.numpy()})[0]


def check_close(what: str, actual: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Raise `ExportError` if the largest difference is more than `tolerance` of the largest value."""
    worst = float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12))
    if not worst <= tolerance:
        raise ExportError(f"{what}: relative difference {worst:.2e}, allowed {tolerance:.0e}")


def _check_code(
    outputs: dict[str, np.ndarray], expected: dict[str, np.ndarray], graph: AttributionGraph
) -> NDArray[np.bool_]:
    """Raise unless activations agree, and features up to ties. Returns a mask [B] of the images with equal features."""
    allowed = TOLERANCE * float(np.abs(expected["feature_values"]).max())
    ours, theirs = _active(outputs), _active(expected)
    same = np.ones(len(ours), dtype=bool)
    for image, layer in np.ndindex(len(ours), graph.layers):
        pair = ours[image][layer], theirs[image][layer]
        for feature in pair[0].keys() | pair[1].keys():
            if feature in pair[0] and feature in pair[1]:
                difference = abs(pair[0][feature] - pair[1][feature])
            else:
                has, lacks = pair if feature in pair[0] else pair[::-1]
                difference = abs(_rank(graph, layer, feature, has[feature]) - _edge(graph, layer, lacks))
                same[image] = False
            if not difference <= allowed:
                raise ExportError(
                    f"feature {feature} of layer {layer}: activation differs by {difference:.2e}, allowed {allowed:.0e}"
                )
    return same


def _rank(graph: AttributionGraph, layer: int, feature: int, activation: float) -> float:
    """The value by which the graph ranks features, largest first; with 0 or less a feature is never active."""
    if graph.threshold is not None:
        return activation - float(graph.threshold[layer, feature])
    return abs(activation)


def _edge(graph: AttributionGraph, layer: int, active: dict[int, float]) -> float:
    """The rank that a further feature would have needed: that of the last active one if all places are used, else 0."""
    if len(active) < graph.places[layer]:
        return 0.0
    return min(_rank(graph, layer, feature, activation) for feature, activation in active.items())


def _active(outputs: dict[str, np.ndarray]) -> list[list[dict[int, float]]]:
    """Active features and their activations, for every image and layer."""
    indices, values = outputs["feature_indices"], outputs["feature_values"]
    return [
        [{int(f): float(z) for f, z in zip(*layer, strict=True) if z != 0} for layer in zip(*image, strict=True)]
        for image in zip(indices, values, strict=True)
    ]
