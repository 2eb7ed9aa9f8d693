"""Writes residual SAEs into a bundle: their graphs, checked against torch, and what the manifest says of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrine.models.account.residual import ResidualTrace
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import (
    MANIFEST,
    RESIDUAL,
    RESIDUAL_ACTIVATIONS,
    RESIDUAL_OUTPUTS,
    RESIDUAL_OUTPUTS_EMBEDDINGS,
    RESIDUAL_RERUN,
    RESIDUAL_STARTS,
    RESIDUAL_STARTS_LOGIT,
    RESIDUAL_TRACE,
    RESIDUAL_TRACE_OUTPUTS,
    residual_file,
    residual_rows_file,
)
from vitrine.models.bundle.manifest import Data, Metrics, ResidualSummary
from vitrine.models.bundle.sealing import seal
from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.average import mean_residual_code
from vitrine.models.dictionary.residual_sae import ResidualSaes
from vitrine.models.export.rerun import check_rerun, export_rerun
from vitrine.models.export.residual_parity import BlockGraph, check_residual, held_by
from vitrine.models.export.served_clt import vision_of
from vitrine.models.files.names import check_name
from vitrine.models.files.problems import naming
from vitrine.models.files.writing import move_folder, prepare_folder
from vitrine.models.graph.gated_trace import GatedTraceGraph
from vitrine.models.graph.onnx_file import ExportError, save_onnx, to_onnx
from vitrine.models.graph.residual import FeatureSourcesGraph, LogitSourcesGraph
from vitrine.models.graph.residual_rerun import ResidualRerunGraph
from vitrine.models.graph.vision import VisionGraph

# Graphs of the bundle that may have the same tensors.
BESIDE = ("vision.onnx", "replacement.onnx", "trace.onnx", "sources.onnx")


@dataclass(frozen=True)
class ResidualExport:
    """Trained residual SAEs, and the fields of the manifest that come from their run."""

    saes: ResidualSaes  # in evaluation mode
    data: Data
    recipe: str
    metrics: Metrics
    images: Sequence[Tensor] = ()  # batches of normalised pixels: the average picture


def add_residual(bundle: Bundle, clip: Clip, export: ResidualExport, out: Path) -> Bundle:
    """Write a copy of a bundle with these residual SAEs, in place of those that it may have, whose cards are left out.

    Raises:
        ExportError: `out` exists, the bundle has another CLIP, or the graphs differ from torch.
        FileError: it cannot be written.
    """
    check_name(out)
    if out.exists():
        raise ExportError(f"{out} already exists, and a bundle is never changed; choose another place")
    if bundle.manifest.clip.sha256 != clip.sha256:
        raise ExportError(f"{bundle.path} has a CLIP with other weights than {clip.name} {clip.weights}")
    prepare_folder(out.parent)
    with naming(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle-") as scratch:
        partial = Path(scratch) / out.name
        others = shutil.ignore_patterns(f"{RESIDUAL}*")  # with the folder of their cards
        shutil.copytree(bundle.path, partial, ignore=others, copy_function=shutil.copyfile)
        partial.chmod(partial.stat().st_mode | 0o700)  # the other one may be read-only
        has_rows = bundle.encoders is not None or not bundle.manifest.has_features
        vision = vision_of(partial, bundle.manifest, clip.tower) if has_rows else None
        summary = write_residual(partial, clip, export, bundle.manifest.tables, vision)
        sealed = seal(partial, bundle.manifest.model_copy(update={"residual": summary, "residual_cards": None}))
        move_folder(partial, out, last=MANIFEST)
    return replace(sealed, path=out)


def write_residual(
    folder: Path,
    clip: Clip,
    export: ResidualExport,
    tables: Literal["float32", "float16"],
    vision: VisionGraph | None,
) -> ResidualSummary:
    """Write the graphs beside those of a bundle, whose tensors they share. tables: precision of the SAEs' weights.

    vision: the bundle's vision graph, for interventions; None: the bundle is from before there were any, and has none.

    Raises `ExportError`.
    """
    tower = clip.tower
    if export.saes.layers != tower.layers - 1 or export.saes.width != tower.width:
        raise ExportError(
            f"{export.saes.layers} residual SAEs of width {export.saes.width} do not fit a CLIP of "
            f"{tower.layers} layers and width {tower.width}"
        )
    saes = rounded(export.saes, getattr(torch, tables))
    files = _write_rows(folder, saes, getattr(torch, tables))
    trace = GatedTraceGraph(tower, saes).eval()
    pixels = torch.zeros(2, 3, *tower.image_size)
    beside = [*files, *(folder / name for name in BESIDE if (folder / name).exists())]
    save_onnx(to_onnx(trace, {"pixels": pixels}, RESIDUAL_TRACE_OUTPUTS), folder / RESIDUAL_TRACE, beside)
    with torch.no_grad():
        outputs = dict(zip(RESIDUAL_TRACE_OUTPUTS, (part.numpy() for part in trace(pixels)), strict=True))
    image, beside = ResidualTrace.from_batch(outputs, 0), [*beside, folder / RESIDUAL_TRACE]
    blocks = [_write_block(folder, clip, saes, block, image, beside) for block in range(tower.layers)]
    check_residual(clip, saes, trace, blocks, folder)
    if vision is not None and saes.layers:
        rerun, file = ResidualRerunGraph(vision, saes).eval(), folder / RESIDUAL_RERUN
        features = list(saes.architecture.features)
        export_rerun(rerun, vision, features, file, beside)
        check_rerun(clip, rerun, features, file)
    if export.images and saes.layers:
        np.save(folder / RESIDUAL_ACTIVATIONS, mean_residual_code(tower, saes, export.images).numpy())
    architecture = saes.architecture
    return ResidualSummary(
        features=architecture.features,
        k=architecture.k,
        k_cls=architecture.k_cls,
        sparsifier=architecture.sparsifier,
        tables=tables,
        bytes=sum(file.stat().st_size for file in folder.iterdir() if file.name.startswith(RESIDUAL)),
        data=export.data,
        recipe=export.recipe,
        metrics=export.metrics,
    )


def rounded(saes: ResidualSaes, tables: torch.dtype) -> ResidualSaes:
    """The SAEs with weights that are exact in `tables`: what a decoder's row loses by that is part of the error."""
    saes = deepcopy(saes)
    with torch.no_grad():
        for part in (*saes.encoders, *saes.decoders):
            for tensor in (part.weight, part.bias):
                tensor.copy_(tensor.to(tables))
    return saes


def _write_rows(folder: Path, saes: ResidualSaes, tables: torch.dtype) -> list[Path]:
    """Write the tables of what features read and write, from which the graphs read them too."""
    files = []
    for layer, (encoder, decoder) in enumerate(zip(saes.encoders, saes.decoders, strict=True)):
        for kind, rows in (("encoder", encoder.weight), ("decoder", decoder.weight)):
            files.append(folder / residual_rows_file(layer, kind))
            np.save(files[-1], rows.detach().to(tables).numpy())
    return files


def has_saes(bundle: Bundle, saes: ResidualSaes) -> bool:
    """Whether the residual SAEs of a bundle are these: whether its graphs have their weights."""
    summary, sizes = bundle.manifest.residual, saes.architecture
    if summary is None:
        return False
    if (summary.features, summary.k, summary.k_cls) != (sizes.features, sizes.k, sizes.k_cls):
        return False
    saes = rounded(saes, getattr(torch, summary.tables))
    for layer, (encoder, decoder) in enumerate(zip(saes.encoders, saes.decoders, strict=True)):
        of_layer, above = (bundle.path / residual_file(block) for block in (layer, layer + 1))
        parts = (
            (of_layer, "rows", encoder.weight),
            (of_layer, "biases", encoder.bias),
            (above, "below.weight", decoder.weight),
        )
        if not all(_has(file, name, weight) for file, name, weight in parts):
            return False
    return True


def _has(graph: Path, name: str, weight: Tensor) -> bool:
    """Whether a graph has this tensor, as it is, in half precision or transposed (`models.graph.onnx_file`)."""
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        if tensor.name == name or tensor.name.startswith(f"{name}."):
            stored: NDArray[np.floating] = onnx.numpy_helper.to_array(tensor, str(graph.parent))
            stored = stored.T if tensor.name.count(".transposed") % 2 else stored
            return np.array_equal(stored.astype(np.float32), weight.detach().cpu().numpy())
    return False


def _write_block(
    folder: Path, clip: Clip, saes: ResidualSaes, block: int, trace: ResidualTrace, beside: Sequence[Path]
) -> BlockGraph:
    """Write what goes back through one block, and return it in torch. trace: any image's."""
    tower = clip.tower
    held = {name: torch.from_numpy(part) for name, part in held_by(trace, block).items()}
    if block == tower.layers - 1:
        graph: BlockGraph = LogitSourcesGraph(tower, saes).eval()
        dynamic: Sequence[str] = RESIDUAL_STARTS_LOGIT
        start = dict.fromkeys(dynamic, torch.zeros(2, tower.width))
    else:
        graph = FeatureSourcesGraph(tower, saes, block).eval()
        dynamic = RESIDUAL_STARTS[:-1]
        start = {name: torch.zeros(2, dtype=torch.int64) for name in dynamic}
        start[RESIDUAL_STARTS[-1]] = torch.ones(tower.tokens)
    directions = torch.export.Dim("directions")
    outputs = RESIDUAL_OUTPUTS if block else RESIDUAL_OUTPUTS_EMBEDDINGS
    model = to_onnx(graph, start | held, outputs, dynamic={name: {0: directions} for name in dynamic})
    save_onnx(model, folder / residual_file(block), beside)
    return graph
