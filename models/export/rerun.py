"""Writes what interventions need into a bundle: the graph of the changed network, and the encoders' rows as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from vitrine.models.bundle.layout import MLP_ROWS, RERUN, RERUN_INPUTS
from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.export.parity import TOLERANCE, check_close
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.onnx_file import save_onnx, to_onnx
from vitrine.models.graph.rerun import ChangedGraph, RerunGraph
from vitrine.models.graph.variants import preselect
from vitrine.models.graph.vision import VisionGraph
from vitrine.models.precision.sessions import session_options

BESIDE = ("vision.onnx", "replacement.onnx", "trace.onnx", "sources.onnx")  # graphs that may have the same tensors
COMPARED = ("embedding", "rows", "components", "sigma_without", "projection", MLP_ROWS)  # not codes, which may tie
BATCHED = ("gains", "offsets", "direction_gains", "direction_offsets", "heads", "attention", "mlp")


def write_rerun(bundle: Path, clip: Clip, clt: CrossLayerTranscoder | None, vision: VisionGraph) -> None:
    """Write rerun.onnx beside the graphs whose tensors it shares, checked against torch.

    vision: the bundle's. Raises `ExportError`.
    """
    graph, features = ChangedGraph(vision), list[int]()
    if clt is not None:
        assert isinstance(vision, AttributionGraph)
        graph, features = RerunGraph(vision, clt, vision.encoder_rows.dtype), [clt.features] * clt.layers
    file = bundle / RERUN
    export_rerun(graph.eval(), vision, features, file, [bundle / name for name in BESIDE])
    check_rerun(clip, graph, features, file)


def export_rerun(graph: nn.Module, vision: VisionGraph, features: list[int], file: Path, beside: list[Path]) -> None:
    """Write a graph that takes `RERUN_INPUTS`, unchecked. features: of each layer that has any; [] without a CLT."""
    batch, feature, direction = (torch.export.Dim(name) for name in ("batch", "features", "directions"))
    dynamic: dict[str, Mapping[int, Any]] = {name: {0: batch} for name in ("pixels", "heads", "attention", "mlp")}
    dynamic |= {name: {0: feature} for name in ("layers", "indices")}
    dynamic |= {name: {0: batch, 1: feature} for name in ("gains", "offsets")}
    dynamic |= {name: {0: direction} for name in ("places", "directions")}
    dynamic |= {name: {0: batch, 1: direction} for name in ("direction_gains", "direction_offsets")}
    inputs = random_changes(vision, features, 2)
    model = preselect(to_onnx(graph, inputs, vision.always, dynamic=dynamic))
    save_onnx(model, file, [other for other in beside if other.exists()])


def check_rerun(clip: Clip, graph: nn.Module, features: list[int], file: Path) -> None:
    """Raise `ExportError` unless the ONNX file gives open_clip's embedding where nothing is changed, and torch's
    tensors for random changes.

    Where a feature ties with the edge of its budget, torch and ONNX Runtime may choose differently, and all later
    results differ. So only the better half of the images must agree.
    """
    session = onnxruntime.InferenceSession(file, session_options(), providers=["CPUExecutionProvider"])
    vision: Any = graph.vision
    for batch, changed in ((1, False), (5, False), (5, True)):
        inputs = random_changes(vision, features, batch)
        if not changed:
            inputs |= nothing(inputs)
        names, feeds = vision.always, {name: part.numpy() for name, part in inputs.items()}
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        with torch.no_grad():
            expected = dict(zip(names, (part.numpy() for part in graph(*inputs.values())), strict=True))
            embedding = clip.model.encode_image(inputs["pixels"], normalize=True).numpy()
        if not changed:
            check_close(f"{file.name} with nothing changed", outputs["embedding"], embedding, TOLERANCE)
        for name in names:
            if name not in COMPARED:
                continue
            error = np.abs(outputs[name] - expected[name]).reshape(batch, -1).max(1)
            better = error <= np.median(error)
            check_close(f"{name} of {file.name}", outputs[name][better], expected[name][better], TOLERANCE)


def random_changes(vision: VisionGraph, features: list[int], batch: int) -> dict[str, Tensor]:
    """Pixels and changes of everything, as inputs of the graph."""
    tower, generator = vision.tower, torch.Generator().manual_seed(0)
    layers, tokens, heads = tower.layers, tower.tokens, tower.blocks[0].attn.num_heads

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    features = features or [1]  # without any, one that no layer has, and that changes nothing
    of = list(range(len(features)))
    first = [0, *[count - 1 for count in features]]
    directions = nn.functional.normalize(noise(layers + 1, tower.width), dim=-1)
    parts = (
        torch.tensor([0, *of]),
        torch.tensor(first),
        noise(batch, len(of) + 1, tokens) / 2,
        noise(batch, len(of) + 1, tokens) / 10,
        torch.arange(layers + 1),
        directions,
        noise(batch, layers + 1, tokens) / 4,
        noise(batch, layers + 1, tokens) / 10,
        1 + noise(batch, layers, heads, tokens) / 4,
        1 + noise(batch, layers, tokens) / 4,
        1 + noise(batch, layers, tokens) / 4,
    )
    return {"pixels": noise(batch, 3, *tower.image_size)} | dict(zip(RERUN_INPUTS, parts, strict=True))


def nothing(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of such inputs must be otherwise for nothing to be changed: no feature and no direction, factors of 1."""
    none = {name: inputs[name][:0] for name in ("layers", "indices", "places", "directions")}
    none |= {name: inputs[name][:, :0] for name in ("gains", "offsets", "direction_gains", "direction_offsets")}
    return none | {name: torch.ones_like(inputs[name]) for name in ("heads", "attention", "mlp")}
