"""Export a CLIP, with its CLT if there is one: ONNX graphs, tables, tokenizer, manifest, and a parity check.

A bundle is written next to its destination and then moved there as a whole, so a failed export leaves nothing behind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from rich.console import Console
from torch import Tensor

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.label_sets import NamedLabels
from vitrine.models.bundle.layout import (
    DETAILS_INPUT,
    ENCODERS,
    MANIFEST,
    ON_REQUEST,
    REPLACED_INPUT,
    REPLACEMENT_OUTPUTS,
    Variant,
    vision_file,
)
from vitrine.models.bundle.manifest import Agreement, ClipIdentity, Data, Manifest, Metrics, Shape, Text
from vitrine.models.bundle.sealing import seal
from vitrine.models.clip.loading import Clip
from vitrine.models.clip.tokens import Converted, check_tokenizer, convert_tokenizer
from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.models.export.label_fit import label_fit
from vitrine.models.export.parity import check_replacement, check_text, check_vision, no_replacement
from vitrine.models.export.rerun import write_rerun
from vitrine.models.export.residual import ResidualExport, write_residual
from vitrine.models.export.sources import write_sources
from vitrine.models.files.names import check_name
from vitrine.models.files.problems import naming
from vitrine.models.files.writing import move_folder, prepare_folder
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.onnx_file import ExportError, save_onnx, to_onnx
from vitrine.models.graph.replacement import ReplacementGraph
from vitrine.models.graph.text import TextGraph, text_to_onnx
from vitrine.models.graph.variants import make_variant, preselect
from vitrine.models.graph.vision import VisionGraph
from vitrine.models.precision.agreement import measure
from vitrine.models.precision.sessions import session_options
from vitrine.models.progress import Progress
from vitrine.models.texts.labels import notices_of
from vitrine.models.texts.reader import TextReader


@dataclass(frozen=True)
class Provenance:
    """The manifest fields that come from neither the CLIP nor the CLT; without one, `data` is None, `recipe` empty."""

    name: str
    description: str
    labels: Sequence[str]
    templates: Sequence[str]
    data: Data | None
    recipe: str
    metrics: Metrics
    licence: str


def export_bundle(
    clip: Clip,
    clt: CrossLayerTranscoder | None,
    cls_mean: Tensor | None,
    provenance: Provenance,
    out: Path,
    tables: Literal["float32", "float16"] = "float32",
    label_sets: Mapping[str, NamedLabels] | None = None,
    variants: Sequence[Variant] = (),
    calibration: Sequence[Tensor] = (),
    replacement: bool = False,
    sources: bool = False,
    rerun: bool = False,
    residual: ResidualExport | None = None,
    log: Callable[[str], object] = print,
    progress: Progress | None = None,
) -> Bundle:
    """Write the bundle `out` after checking it against torch at batch sizes 1 and 5.

    Args:
        clt: on raw activations; cls_mean: mean [CLS] MLP output [L, d], see `AttributionGraph`. None: a bundle without
            features, whose accounts have the MLPs' rows in their place.
        tables: precision of the CLT's weights in the bundle.
        label_sets: by name; their embeddings are computed here, so that the service need not.
        calibration: batches of normalised pixels. How well the default labels fit them is kept in the manifest.
        variants: of the vision graph; one that does not agree with float32 on the images of `calibration`
            is not written, which is reported to `log`. int8 finds the products that it must leave in
            float32 on the first of them.
        replacement: also write replacement.onnx, mostly L (L + 1) / 2 decoders at one byte per number.
        sources: also write trace.onnx and sources.onnx, for accounts that go on through attention to the features of
            all tokens, with the same decoders, and the average of the images of `calibration`.
        rerun: also write rerun.onnx, for interventions in the running network, with the same decoders.
        residual: also write the graphs of these residual SAEs.
        progress: shows what is being done; None: nothing is shown.

    Raises:
        ExportError: `out` exists (bundles are immutable), there are variants but no images to check them on, or the
            parity check failed.
        FileError: it cannot be written.
    """
    check_new(out)
    if variants and not calibration:
        raise ExportError(f"{', '.join(variants)} must be checked against float32, but there are no images; give some")
    prepare_folder(out.parent)
    progress = progress or Progress(Console(quiet=True))
    progress.begin("exporting the graphs")
    with naming(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle-") as scratch:
        partial = Path(scratch) / out.name
        partial.mkdir()
        graph = _vision(clip, clt, cls_mean, getattr(torch, tables))
        texts = [template.replace("{}", label) for label in provenance.labels for template in provenance.templates]
        tokens = convert_tokenizer(clip.tokenizer)
        manifest = _manifest(clip, clt.architecture if clt else None, graph, provenance, tables, tokens)
        check_tokenizer(clip.tokenizer, tokens, texts)
        for message in _label_warnings(tokens.reader(), provenance, label_sets or {}):
            log(message)
        tokens.tokenizer.save(str(partial / "tokenizer.json"), pretty=False)

        if isinstance(graph, AttributionGraph):
            _write_tables(graph, partial)
        np.save(partial / "fold.npy", torch.cat([graph.fold, graph.beta[None]]).numpy())
        np.save(partial / "attention.npy", clip.tower.attention_fold().numpy())
        pixels = torch.zeros(2, 3, *clip.tower.image_size)
        vision = to_onnx(graph, {"pixels": pixels}, graph.always, ON_REQUEST, DETAILS_INPUT)
        images = [pixels.numpy() for pixels in calibration]
        variant_models = {variant: make_variant(vision, variant, images) for variant in variants}
        save_onnx(preselect(vision), partial / "vision.onnx")
        del vision  # as large as the CLIP
        text = TextGraph(clip.model).eval()
        save_onnx(text_to_onnx(text, clip.context), partial / "text.onnx")

        for name, labels in (label_sets or {}).items():
            _write_label_set(clip, labels, provenance.templates, partial / "label_sets" / name)

        if replacement and clt is not None:
            replacement_graph, mask = (
                ReplacementGraph(clip.tower, clt, getattr(torch, tables)).eval(),
                no_replacement(clt.layers),
            )
            replacing = to_onnx(replacement_graph, {"pixels": pixels, REPLACED_INPUT: mask}, REPLACEMENT_OUTPUTS)
            save_onnx(replacing, partial / "replacement.onnx", beside=[partial / "vision.onnx"])
            check_replacement(clip, replacement_graph, partial / "replacement.onnx")
        if sources:
            progress.begin("source accounts")
            write_sources(partial, clip, clt, getattr(torch, tables), calibration)
        if rerun:
            progress.begin("interventions")
            write_rerun(partial, clip, clt, graph)
        if residual:
            progress.begin("residual SAEs")
            summary = write_residual(partial, clip, replace(residual, images=calibration), tables, graph)
            manifest = manifest.model_copy(update={"residual": summary})
        progress.begin("checking the graphs against torch")
        check_vision(clip, graph, partial / "vision.onnx")
        check_text(clip, text, tokens, texts, partial / "text.onnx")
        default = _default_labels(clip, provenance) if calibration else np.zeros((0, clip.tower.embedding), np.float32)
        agreement = {
            variant: result
            for variant, model in variant_models.items()
            if (result := _write_variant(model, variant, partial, images, default, log, progress))
        }
        text_part = manifest.text.model_copy(update={"fit": label_fit(clip, calibration, default, progress)})
        manifest = manifest.model_copy(
            update={"precisions": ("fp32", *agreement), "agreement": agreement, "text": text_part}
        )
        sealed = seal(partial, manifest)
        move_folder(partial, out, last=MANIFEST)
    return replace(sealed, path=out)


def check_new(out: Path) -> None:
    """Raise `ExportError` if there is something where a bundle is to be written, `FileError` for a name that is no
    UTF-8."""
    check_name(out)
    if out.exists():
        raise ExportError(f"{out} already exists, and a bundle is never changed; choose another place")


def _default_labels(clip: Clip, provenance: Provenance) -> NDArray[np.float32]:
    """Unit embeddings [N, D]."""
    return clip.encode_labels(list(provenance.labels), list(provenance.templates)).numpy()


def _write_variant(
    model: onnx.ModelProto,
    variant: Variant,
    bundle: Path,
    calibration: Sequence[NDArray[np.float32]],
    labels: NDArray[np.float32],
    log: Callable[[str], object],
    progress: Progress,
) -> Agreement | None:
    """Write a variant next to vision.onnx and measure it. If its agreement is too low, remove it and return None."""
    path = bundle / vision_file(variant)
    save_onnx(model, path, beside=[bundle / "vision.onnx"])
    directions, fold = bundle / "directions.npy", np.load(bundle / "fold.npy")[:-1]
    tables = np.load(directions, mmap_mode="r") if directions.exists() else fold[:0], fold
    reference, session = (
        InferenceSession(graph, session_options(), providers=["CPUExecutionProvider"])
        for graph in (bundle / "vision.onnx", path)
    )
    task = progress.task(f"{variant} against fp32", sum(map(len, calibration)), "images")
    result = measure(reference, session, calibration, labels, *tables, done=task.advance)
    if result.is_sufficient:
        return result
    path.unlink()
    path.with_name(f"{path.name}.data").unlink()
    log(f"{variant} is left out: it does not agree with float32: {result.beside_the_least}")
    return None


def _label_warnings(reader: TextReader, provenance: Provenance, label_sets: Mapping[str, NamedLabels]) -> Iterator[str]:
    """What there is to say of the default labels and of the named sets'."""
    for notice in notices_of(reader, provenance.labels, provenance.templates):
        yield notice.message
    for name, labels in label_sets.items():
        for notice in notices_of(reader, labels.labels, labels.templates or provenance.templates):
            yield f"label set {name}: {notice.message}"


def _write_label_set(clip: Clip, labels: NamedLabels, templates: Sequence[str], path: Path) -> None:
    """Write NAME.json and NAME.npy for `path` label_sets/NAME. templates: for sets without their own."""
    path.parent.mkdir(exist_ok=True)
    embeddings = clip.encode_labels(list(labels.labels), list(labels.templates or templates))
    np.save(path.with_name(f"{path.name}.npy"), embeddings.numpy())
    path.with_name(f"{path.name}.json").write_text(labels.model_dump_json(exclude_none=True), encoding="utf-8")


def _vision(clip: Clip, clt: CrossLayerTranscoder | None, cls_mean: Tensor | None, tables: torch.dtype) -> VisionGraph:
    if clt is None:
        return VisionGraph(clip.tower).eval()
    assert cls_mean is not None
    return AttributionGraph(clip.tower, clt, cls_mean, tables).eval()


def _write_tables(graph: AttributionGraph, folder: Path) -> None:
    """Of the features, as `models.bundle.bundle` has them."""
    layers, features = graph.layers, graph.features
    np.save(folder / "directions.npy", graph.directions.reshape(layers, features, -1).numpy())
    if len(graph.last_decoders):
        np.save(folder / "last_decoders.npy", graph.last_decoders.numpy())
    np.save(folder / ENCODERS, graph.encoder_rows.reshape(layers, features, -1).numpy())


def _of_features(architecture: Architecture | None, graph: VisionGraph) -> dict[str, Any]:
    """The fields of `Shape` that come from the CLT."""
    if architecture is None:
        return {"features": 0, "k": 0}
    assert isinstance(graph, AttributionGraph)
    return {
        "features": architecture.features,
        "k": graph.k,
        "k_cls": architecture.k_cls,
        "k_patches": architecture.k,
        "cross_layer": architecture.cross_layer,
    }


def _manifest(
    clip: Clip,
    architecture: Architecture | None,
    graph: VisionGraph,
    provenance: Provenance,
    tables: str,
    tokens: Converted,
) -> Manifest:
    return Manifest(
        name=provenance.name,
        description=provenance.description,
        clip=ClipIdentity(name=clip.name, weights=clip.weights, sha256=clip.sha256),
        preprocessing=clip.preprocessing,
        shape=Shape(
            layers=clip.tower.layers,
            width=clip.tower.width,
            embedding=clip.tower.embedding,
            tokens=clip.tower.tokens,
            heads=clip.tower.blocks[0].attn.num_heads,
            **_of_features(architecture, graph),
        ),
        sparsifier=architecture.sparsifier if architecture else None,
        logit_scale=clip.logit_scale,
        text=Text(
            context=clip.context,
            pad=tokens.pad,
            labels=tuple(provenance.labels),
            templates=tuple(provenance.templates),
            clean=tokens.clean,
            written=tokens.written,
            zeroed=tokens.zeroed,
        ),
        tables=tables,  # type: ignore[arg-type]
        data=provenance.data,
        recipe=provenance.recipe,
        metrics=provenance.metrics,
        licence=provenance.licence,
    )
