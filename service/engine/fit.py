"""Whether a bundle's parts fit together: manifest, graphs and tokenizer. Checked when they are loaded, so that what
does not fit is refused by the name of file and field, and not by a request that fails.

First what the graphs declare; then one image and one text go through them, whose outputs must have the manifest's
shapes and be finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from tokenizers import Tokenizer

from vitrine.models.bundle.bundle import Bundle, BundleError
from vitrine.models.bundle.layout import (
    COMPONENTS,
    DETAILS_INPUT,
    HEAD_COMPONENTS,
    HEADS,
    MANIFEST,
    MLP_ROWS,
    REPLACED_INPUT,
    SCORES_HELD,
    Precision,
    given,
    vision_file,
)
from vitrine.models.bundle.manifest import Manifest
from vitrine.models.texts.reader import TextReader
from vitrine.service.engine.runtime import session_errors

UNIT_TOLERANCE = 1e-2  # of a unit embedding's length, in any precision
_TYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(bool)": np.bool_, "tensor(int64)": np.int64}
_FIELDS = {"pixels": "preprocessing.size", "tokens": "text.context", REPLACED_INPUT: "shape.layers"}
Dimensions = tuple[int | None, ...]  # None: any number


@dataclass(frozen=True)
class Graph:
    """What a graph is by the manifest: inputs (type, dimensions) and outputs (dimensions), by name."""

    file: str
    inputs: dict[str, tuple[str, Dimensions]]
    outputs: dict[str, Dimensions]
    features: int  # more than any index in its outputs
    field_of_features: str = "shape.features"  # of the manifest, that says so


def vision_graph(
    manifest: Manifest, precision: Precision, with_details: bool, with_components: bool, with_mlp: bool
) -> Graph:
    """vision.onnx or one of its variants."""
    shape = manifest.shape
    layers, embedding, tokens, rows = shape.layers, shape.embedding, shape.tokens, 2 * shape.layers + 3
    inputs, outputs = of_pixels(manifest), accounts(manifest, rows, shape.k)
    if with_components:
        outputs[COMPONENTS] = (None, rows, shape.width)
    if with_mlp:
        outputs[MLP_ROWS] = (None, layers, embedding)
    if with_details:
        inputs[DETAILS_INPUT] = ("tensor(bool)", ())
        outputs |= {
            "lens": (None, layers, embedding),
            "attention_weights": (None, layers, None, tokens),
            "attention_values": (None, layers, tokens, shape.width),
            "token_norms": (None, tokens),
        }
        if with_components:
            outputs[HEAD_COMPONENTS] = (None, layers, None, shape.width)
    return Graph(vision_file(precision), inputs, outputs, shape.features)


def accounts(manifest: Manifest, rows: int, k: int) -> dict[str, Dimensions]:
    """The outputs of a graph that accounts for [CLS] by so many rows and places of the code."""
    layers, embedding = manifest.shape.layers, manifest.shape.embedding
    outputs: dict[str, Dimensions] = {
        "embedding": (None, embedding),
        "rows": (None, rows, embedding),
        "sigma": (None,),
        "sigma_without": (None, rows),
        "norm": (None,),
        "feature_indices": (None, layers, k),
        "feature_values": (None, layers, k),
        "projection": (None, layers),
        "fidelity": (None, 2),
    }
    return _given(outputs, manifest)


def _given(dimensions: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Those of these inputs or outputs that there are in this bundle."""
    return {name: dimensions[name] for name in given([*dimensions], manifest.has_features)}


def text_graph(manifest: Manifest) -> Graph:
    """text.onnx. It takes texts of the manifest's length, or of any up to that."""
    inputs: dict[str, tuple[str, Dimensions]] = {"tokens": ("tensor(int64)", (None, manifest.text.context))}
    outputs: dict[str, Dimensions] = {"text_embedding": (None, manifest.shape.embedding)}
    return Graph("text.onnx", inputs, outputs, manifest.shape.features)


def replacement_graph(manifest: Manifest) -> Graph:
    """replacement.onnx."""
    layers = manifest.shape.layers
    inputs = of_pixels(manifest) | {REPLACED_INPUT: ("tensor(bool)", (layers, 2))}
    outputs: dict[str, Dimensions] = {
        "embedding": (None, manifest.shape.embedding),
        "contributions": (None, 2, layers, layers),
    }
    return Graph("replacement.onnx", inputs, outputs, manifest.shape.features)


def trace_graph(manifest: Manifest) -> Graph:
    """trace.onnx."""
    shape = manifest.shape
    layers, tokens, width = shape.layers, shape.tokens, shape.width
    outputs = held_fast(manifest) | {
        "embedded": (None, tokens, width),
        "written": (None, layers, tokens, width),
        "indices": (None, layers, tokens, None),
        "values": (None, layers, tokens, None),
    }
    return Graph("trace.onnx", of_pixels(manifest), _given(outputs, manifest), shape.features)


def of_pixels(manifest: Manifest) -> dict[str, tuple[str, Dimensions]]:
    """The input of a graph that takes images alone."""
    return {"pixels": ("tensor(float)", (None, 3, *manifest.preprocessing.size))}


def held_fast(manifest: Manifest) -> dict[str, Dimensions]:
    """The first outputs of every trace."""
    shape = manifest.shape
    layers, tokens = shape.layers, shape.tokens
    return {
        "embedding": (None, shape.embedding),
        "scale": (None,),
        "norm": (None,),
        "attention_weights": (None, layers, None, tokens, tokens),
        "before_attention": (None, layers, tokens),
        "before_mlp": (None, layers, tokens),
    }


def sources_graph(manifest: Manifest, heads: int) -> Graph:
    """sources.onnx, for one direction in the outputs. heads: as trace.onnx has them, the manifest does not say."""
    shape = manifest.shape
    layers, tokens, width = shape.layers, shape.tokens, shape.width
    inputs: dict[str, tuple[str, Dimensions]] = {
        "direction": ("tensor(float)", (None, width)),
        **dict.fromkeys(("layer", "token", "feature"), ("tensor(int64)", (None,))),
        "attention_weights": ("tensor(float)", (layers, heads, tokens, tokens)),
        "before_attention": ("tensor(float)", (layers, tokens)),
        "before_mlp": ("tensor(float)", (layers, tokens)),
        "embedded": ("tensor(float)", (tokens, width)),
        "written": ("tensor(float)", (layers, tokens, width)),
        "indices": ("tensor(int64)", (layers, tokens, None)),
        "values": ("tensor(float)", (layers, tokens, None)),
    }
    outputs: dict[str, Dimensions] = {
        "embeddings": (None, tokens),
        "errors": (None, layers, tokens),
        "constants": (None,),
        "features": (None, layers, tokens, None),
        "biases": (None, layers),
        "gradients": (None, layers, 2, width),
    }
    return Graph("sources.onnx", _given(inputs, manifest), _given(outputs, manifest), shape.features)


def scores_graph(manifest: Manifest, heads: int) -> Graph:
    """scores.onnx, for one head in the outputs. heads: as for `sources_graph`."""
    shape = manifest.shape
    held = sources_graph(manifest, heads).inputs
    inputs: dict[str, tuple[str, Dimensions]] = dict.fromkeys(HEADS, ("tensor(int64)", (None,)))
    inputs |= {name: held[name] for name in SCORES_HELD}
    width = shape.width // heads
    outputs: dict[str, Dimensions] = {
        "queries": (None, shape.tokens, width),
        "keys": (None, shape.tokens, width),
        "rows": (None, 2, width, shape.width),
        "biases": (None, 2, width),
    }
    return Graph("scores.onnx", inputs, outputs, shape.features)


def check_graph(
    bundle: Bundle, graph: Graph, session: InferenceSession, feeds: dict[str, NDArray[Any]] | None = None
) -> None:
    """Raise `BundleError` or `EngineError` unless an opened graph is what the manifest says, and runs.

    feeds: inputs to run it with; default: noise.
    """
    file = bundle.path / graph.file
    _check_inputs(bundle, graph, session)
    if missing := graph.outputs.keys() - {output.name for output in session.get_outputs()}:
        raise BundleError(f"{file} has no output {min(missing)}: it belongs to another bundle; export this one again")
    feeds = feeds or _feeds(graph)
    given = ", ".join(f"{name} {list(feed.shape)} ({_FIELDS.get(name, 'shape')})" for name, feed in feeds.items())
    with session_errors(f"{file}, run with the inputs of {MANIFEST}, {given},"):
        values = session.run(list(graph.outputs), feeds)
    for (name, dimensions), value in zip(graph.outputs.items(), values, strict=True):
        if not _fits(value.shape, (1, *dimensions[1:])):
            said = ", ".join("any" if size is None else str(size) for size in (1, *dimensions[1:]))
            raise BundleError(
                f"{file}: its output {name} has the shape {list(value.shape)}, but {MANIFEST} says [{said}] (shape)"
            )
        if not np.isfinite(value).all():
            raise BundleError(f"{file}: its output {name} has values that are not finite")
        if name in ("embedding", "text_embedding"):
            check_unit(value, f"{file}: its output {name}")
        if name in ("feature_indices", "indices") and not 0 <= value.min() <= value.max() < graph.features:
            raise BundleError(
                f"{file}: its output {name} goes up to {value.max()}, but {MANIFEST} says {graph.field_of_features} = "
                f"{graph.features}"
            )


def check_unit(embeddings: NDArray[np.floating], what: str) -> None:
    """Raise `BundleError` unless embeddings [N, D] are finite and of length 1."""
    lengths = np.linalg.norm(embeddings.astype(np.float32), axis=-1)
    if not np.abs(lengths - 1).max(initial=0) <= UNIT_TOLERANCE:  # false for NaN, too
        raise BundleError(f"{what} does not have length 1, or is not finite")


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer as its file has it."""

    tokenizer: Tokenizer
    padding: dict[str, Any] | None
    truncation: dict[str, Any] | None
    largest: int  # token


def check_tokenizer(bundle: Bundle, tokens: TokenizerFile, session: InferenceSession) -> TextReader:
    """What reads texts for this bundle. Raises `BundleError` or `EngineError` unless they can be given to text.onnx."""
    file, text = bundle.path / "tokenizer.json", bundle.manifest.text
    length = (tokens.truncation or {}).get("max_length")
    if length != text.context:
        raise BundleError(
            f"{file} cuts texts to {length} tokens (truncation), but {MANIFEST} says text.context = {text.context}"
        )
    padding = tokens.padding or {}
    if (padding.get("length"), padding.get("pad_id")) != (text.context, text.pad):
        raise BundleError(
            f"{file} pads texts to {padding.get('length')} tokens with {padding.get('pad_id')} (padding), but "
            f"{MANIFEST} says text.context = {text.context}, text.pad = {text.pad}"
        )
    prompt = text.templates[0].replace("{}", text.labels[0])
    try:
        reader = TextReader(tokens.tokenizer, text.clean, text.written, text.zeroed)
        (ids, _), *_ = reader.read([prompt, *text.written])
    except ValueError as error:
        raise BundleError(f"{file} does not match text.written in {MANIFEST}: {error}") from error
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise BundleError(f"{file} cannot read the text {prompt[:100]!r}: {error}") from error
    if not ids:
        raise BundleError(f"{file} makes no tokens from {prompt[:100]!r}")
    with session_errors(
        f"{bundle.path / 'text.onnx'} run with token {tokens.largest}, the last one in tokenizer.json,"
    ):
        session.run(None, {"tokens": np.full((1, text.context), max(tokens.largest, text.pad), np.int64)})
    return reader


def _check_inputs(bundle: Bundle, graph: Graph, session: InferenceSession) -> None:
    file, inputs = bundle.path / graph.file, {node.name: node for node in session.get_inputs()}
    if unknown := inputs.keys() - graph.inputs.keys():
        why = f"; {MANIFEST} does not list attention.npy, which belongs to it" if unknown == {DETAILS_INPUT} else ""
        raise BundleError(f"{file} has an input {min(unknown)}, which this bundle's graph does not have{why}")
    for name, (kind, dimensions) in graph.inputs.items():
        if name not in inputs:
            raise BundleError(f"{file} has no input {name}: it belongs to another bundle; export this one again")
        node = inputs[name]
        declared = tuple(size if isinstance(size, int) else None for size in node.shape)
        if node.type != kind or not _fits(declared, dimensions):
            said = [size or "any" for size in dimensions]
            field = _FIELDS.get(name, "shape")
            raise BundleError(
                f"{file}: its input {name} is {node.type} {node.shape}, but {MANIFEST} says {said} ({field})"
            )


def _fits(found: Dimensions, wanted: Dimensions) -> bool:
    """Whether dimensions are equal, as far as both are known."""
    return len(found) == len(wanted) and all(
        a is None or b is None or a == b for a, b in zip(found, wanted, strict=True)
    )


def _feeds(graph: Graph) -> dict[str, NDArray[Any]]:
    """One image of noise with all details, one text of padding."""
    feeds = {
        name: np.zeros([size or 1 for size in shape], _TYPES[kind]) for name, (kind, shape) in graph.inputs.items()
    }
    if "pixels" in feeds:
        feeds["pixels"] += np.asarray(np.random.default_rng(0).standard_normal(feeds["pixels"].shape), np.float32)
    if DETAILS_INPUT in feeds:
        feeds[DETAILS_INPUT] = np.array(True)
    return feeds
