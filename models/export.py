"""A CLIP and its CLT as a bundle: ONNX graphs, tables, tokenizer, manifest, and a parity check that can fail.

A bundle is written beside its destination and moved there whole, so a failed export leaves nothing behind.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx.external_data_helper import set_external_data
from pydantic import ValidationError
from torch import Tensor, nn

from models.bundle import (
    VISION_OUTPUTS,
    Bundle,
    ClipIdentity,
    Data,
    Manifest,
    Metrics,
    Preprocessing,
    Shape,
    Text,
    seal,
)
from models.clip import Clip
from models.clt import Architecture, CrossLayerTranscoder
from models.errors import VitrineError
from models.graph import AttributionGraph
from models.tokens import check_tokenizer, convert_tokenizer

OPSET = 20
EXTERNAL_FROM = 1024  # bytes; smaller tensors stay inside the .onnx file
TOLERANCE = 1e-4  # relative to the largest value of an output, torch against ONNX Runtime
ADDITIVITY = 1e-5  # rows against embedding, unit norm


class ExportError(VitrineError):
    """The exported graphs do not do what the torch modules do; nothing was written. The message says what differs."""


@dataclass(frozen=True)
class Provenance:
    """What a manifest says that neither the CLIP nor the CLT knows."""

    name: str
    description: str
    labels: Sequence[str]
    templates: Sequence[str]
    data: Data
    recipe: str
    metrics: Metrics
    licence: str


def export_bundle(
    clip: Clip,
    clt: CrossLayerTranscoder,
    cls_mean: Tensor,
    provenance: Provenance,
    out: Path,
    tables: Literal["float32", "float16"] = "float32",
) -> Bundle:
    """Write the bundle `out`, after checking it against torch at batches of 1 and 5.

    Args:
        clt: on raw activations; cls_mean: mean [CLS] MLP output [L, d], see `AttributionGraph`.
        tables: precision of the CLT's weights in the bundle.

    Raises:
        ExportError: `out` exists (bundles are immutable), or the parity check failed.
    """
    if out.exists():
        raise ExportError(f"{out} exists; a bundle is never changed, choose another place")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        partial = Path(scratch) / out.name
        partial.mkdir()
        graph = AttributionGraph(clip.tower, clt, cls_mean, getattr(torch, tables)).eval()
        texts = [template.replace("{}", label) for label in provenance.labels for template in provenance.templates]
        tokenizer, pad = convert_tokenizer(clip.tokenizer)
        manifest = _manifest(clip, clt.architecture, graph, provenance, tables, pad)
        check_tokenizer(clip.tokenizer, tokenizer, texts)
        tokenizer.save(str(partial / "tokenizer.json"), pretty=False)

        np.save(partial / "directions.npy", graph.directions.reshape(clt.layers, clt.features, clt.width).numpy())
        np.save(partial / "fold.npy", torch.cat([graph.fold, graph.beta[None]]).numpy())
        height, width = clip.tower.image_size
        _write_onnx(graph, torch.zeros(2, 3, height, width), "pixels", VISION_OUTPUTS, partial / "vision.onnx")
        text = _TextGraph(clip.model).eval()
        _write_onnx(
            text, torch.zeros(2, clip.context, dtype=torch.long), "tokens", ("text_embedding",), partial / "text.onnx"
        )

        check_vision(clip, graph, partial / "vision.onnx")
        check_text(text, clip.tokenizer(texts), partial / "text.onnx")
        sealed = seal(partial, manifest)
        shutil.move(partial, out)
    return replace(sealed, path=out)


def check_vision(clip: Clip, graph: AttributionGraph, path: Path) -> None:
    """Raise `ExportError` unless the ONNX file gives what torch gives, for batches of 1 and 5.

    Embedding against open_clip's own `encode_image`; rows against the embedding they must add up to; every output
    against the torch module. A feature may be active in one and not in the other only where it ties with the edge of
    its layer's budget or with its threshold; what is made of the features is then compared on the other images.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for batch in (1, 5):
        pixels = torch.randn(batch, 3, *clip.tower.image_size, generator=generator)
        with torch.no_grad():
            torch_outputs = dict(zip(VISION_OUTPUTS, (o.numpy() for o in graph(pixels)), strict=True))
            plain = clip.model.encode_image(pixels, normalize=True).numpy()
        found = dict(zip(VISION_OUTPUTS, session.run(VISION_OUTPUTS, {"pixels": pixels.numpy()}), strict=True))
        _check_close("embedding against open_clip's encode_image", found["embedding"], plain, TOLERANCE)
        _check_close("sum of rows against the embedding", found["rows"].sum(1), found["embedding"], ADDITIVITY)
        same = _check_code(found, torch_outputs, graph)
        compared += int(same.sum())
        for name in VISION_OUTPUTS:
            if name.startswith("feature_") or not same.any():
                continue
            _check_close(f"{name} at batch {batch}", found[name][same], torch_outputs[name][same], TOLERANCE)
    if not compared:
        raise ExportError("in every image a feature ties with the edge of its budget: nothing could be compared")


def check_text(text: nn.Module, tokens: Tensor, path: Path) -> None:
    """Raise `ExportError` unless text.onnx gives torch's embeddings."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (tokens[:1], tokens[:5]):
        with torch.no_grad():
            expected = text(batch).numpy()
        _check_close(
            "text embedding", session.run(["text_embedding"], {"tokens": batch.numpy()})[0], expected, TOLERANCE
        )


class _TextGraph(nn.Module):
    """Tokens [N, context] -> unit text embeddings [N, D]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens, normalize=True)


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
        return activation - float(graph.threshold[layer, 0, feature])
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


def _write_onnx(module: nn.Module, example: Tensor, input_name: str, outputs: Sequence[str], path: Path) -> None:
    """Export with a dynamic batch; large tensors go to `path`.data, the directions stay in directions.npy."""
    with _quiet_exporter():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _strip(model)
    for tensor in model.graph.initializer:
        if tensor.name == "directions":
            _point_at_npy(tensor, path.parent / "directions.npy")
    _store_halves_losslessly(model)
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=EXTERNAL_FROM)
    path.with_name(f"{path.name}.data").chmod(0o644)  # onnx makes it the owner's alone; services run as others


def _strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes for its own debugging: stack traces with the paths of the exporting machine."""
    graph = model.graph
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.ClearField("doc_string")


def _store_halves_losslessly(model: onnx.ModelProto) -> None:
    """Keep float32 tensors whose every value is a float16 as such, with a Cast (folded when a session is made).

    Many published CLIP weights are float16; their bundles need half the space, bit for bit the same.
    """
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or tensor.data_location == onnx.TensorProto.EXTERNAL:
            continue  # what lies in a file of its own stays as it is there
        values = onnx.numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if values.nbytes < EXTERNAL_FROM or not np.array_equal(halves.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(halves, f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _point_at_npy(tensor: onnx.TensorProto, file: Path) -> None:
    """Let an ONNX tensor read its bytes from a .npy file that holds the same values."""
    mapped = np.load(file, mmap_mode="r")
    if mapped.nbytes != len(tensor.raw_data) or mapped.tobytes() != tensor.raw_data:
        raise ExportError(f"{tensor.name} and {file.name} hold different values")
    set_external_data(tensor, file.name, offset=mapped.offset, length=mapped.nbytes)
    tensor.ClearField("raw_data")


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter's warnings are about its own internals; the parity check is what we go by."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _manifest(
    clip: Clip, architecture: Architecture, graph: AttributionGraph, provenance: Provenance, tables: str, pad: int
) -> Manifest:
    preprocess = clip.preprocess
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    try:
        preprocessing = Preprocessing(
            size=(height, width),
            mean=tuple(preprocess["mean"]),
            std=tuple(preprocess["std"]),
            interpolation=preprocess["interpolation"],
            resize_mode=preprocess["resize_mode"],
        )
    except ValidationError as error:
        problems = "; ".join(problem["msg"] for problem in error.errors())
        raise ExportError(f"the service cannot prepare images as {clip.name} needs them: {problems}") from error
    return Manifest(
        name=provenance.name,
        description=provenance.description,
        clip=ClipIdentity(name=clip.name, weights=clip.weights, sha256=clip.sha256),
        preprocessing=preprocessing,
        shape=Shape(
            layers=architecture.layers,
            width=architecture.width,
            embedding=clip.tower.embedding,
            features=architecture.features,
            k=graph.k,
            k_cls=architecture.k_cls,
            k_patches=architecture.k,
            cross_layer=architecture.cross_layer,
            tokens=clip.tower.tokens,
        ),
        sparsifier=architecture.sparsifier,
        logit_scale=clip.logit_scale,
        text=Text(
            context=clip.context, pad=pad, labels=tuple(provenance.labels), templates=tuple(provenance.templates)
        ),
        tables=tables,  # type: ignore[arg-type]
        data=provenance.data,
        recipe=provenance.recipe,
        metrics=provenance.metrics,
        licence=provenance.licence,
    )
