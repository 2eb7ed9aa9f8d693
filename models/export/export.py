"""A CLIP and its CLT as a bundle: ONNX graphs, tables, tokenizer, manifest, and a parity check that can fail.

A bundle is written beside its destination and moved there whole, so a failed export leaves nothing behind.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from vitrine.models.bundle.bundle import (
    DETAILS,
    DETAILS_INPUT,
    REPLACED_INPUT,
    REPLACEMENT_OUTPUTS,
    VISION_OUTPUTS,
    Agreement,
    Bundle,
    ClipIdentity,
    Data,
    Manifest,
    Metrics,
    Preprocessing,
    Shape,
    Text,
    Variant,
    seal,
    vision_file,
)
from vitrine.models.bundle.label_sets import NamedLabels
from vitrine.models.clip.tokens import check_tokenizer, convert_tokenizer
from vitrine.models.clip.tower import Clip
from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.onnx_file import ExportError, save_onnx, to_onnx
from vitrine.models.graph.replacement import ReplacementGraph
from vitrine.models.graph.variants import make_variant, measure, preselect

TOLERANCE = 1e-4  # relative to the largest value of an output, torch against ONNX Runtime
ADDITIVITY = 1e-5  # rows against embedding, unit norm


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
    label_sets: Mapping[str, NamedLabels] | None = None,
    variants: Sequence[Variant] = (),
    calibration: Sequence[Tensor] = (),
    replacement: bool = False,
    say: Callable[[str], object] = print,
) -> Bundle:
    """Write the bundle `out`, after checking it against torch at batches of 1 and 5.

    Args:
        clt: on raw activations; cls_mean: mean [CLS] MLP output [L, d], see `AttributionGraph`.
        tables: precision of the CLT's weights in the bundle.
        label_sets: by name; their embeddings are made here, so that a service need not.
        variants: of the vision graph; one that does not agree with float32 on the images of `calibration` (batches of
            normalised pixels) is not written, which `say` is told.
        replacement: with replacement.onnx, of which most is L (L + 1) / 2 decoders of a byte a number.

    Raises:
        ExportError: `out` exists (bundles are immutable), there are variants and no images to check them on, or the
            parity check failed.
    """
    if out.exists():
        raise ExportError(f"{out} exists; a bundle is never changed, choose another place")
    if variants and not calibration:
        raise ExportError(f"{', '.join(variants)} must be checked against float32: give images for it")
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
        if len(graph.last_decoders):
            np.save(partial / "last_decoders.npy", graph.last_decoders.numpy())
        np.save(partial / "fold.npy", torch.cat([graph.fold, graph.beta[None]]).numpy())
        np.save(partial / "attention.npy", clip.tower.attention_fold().numpy())
        pixels = torch.zeros(2, 3, *clip.tower.image_size)
        vision = to_onnx(graph, pixels, "pixels", VISION_OUTPUTS, DETAILS, DETAILS_INPUT)
        faster = {variant: make_variant(vision, variant) for variant in variants}
        save_onnx(preselect(vision), partial / "vision.onnx")
        text = _TextGraph(clip.model).eval()
        tokens = torch.zeros(2, clip.context, dtype=torch.long)
        save_onnx(to_onnx(text, tokens, "tokens", ("text_embedding",)), partial / "text.onnx")

        for name, labels in (label_sets or {}).items():
            _write_label_set(clip, labels, provenance.templates, partial / "label_sets" / name)

        if replacement:
            replacing, nothing = ReplacementGraph(clip.tower, clt, getattr(torch, tables)).eval(), _nothing(clt.layers)
            made = to_onnx(replacing, pixels, "pixels", REPLACEMENT_OUTPUTS, fixed={REPLACED_INPUT: nothing})
            save_onnx(made, partial / "replacement.onnx", beside=partial / "vision.onnx")
            check_replacement(clip, replacing, partial / "replacement.onnx")
        check_vision(clip, graph, partial / "vision.onnx")
        check_text(text, clip.tokenizer(texts), partial / "text.onnx")
        default = clip.encode_labels(list(provenance.labels), list(provenance.templates)).numpy()
        agreement = {
            variant: found
            for variant, model in faster.items()
            if (found := _gated(model, variant, partial, calibration, default, say))
        }
        manifest = manifest.model_copy(update={"precisions": ("fp32", *agreement), "agreement": agreement})
        sealed = seal(partial, manifest)
        shutil.move(partial, out)
    return replace(sealed, path=out)


def _gated(
    model: onnx.ModelProto,
    variant: Variant,
    bundle: Path,
    calibration: Sequence[Tensor],
    labels: NDArray[np.float32],
    say: Callable[[str], object],
) -> Agreement | None:
    """Write a variant beside vision.onnx and measure it; None, and nothing written, if it fails its gate."""
    path = bundle / vision_file(variant)
    save_onnx(model, path, beside=bundle / "vision.onnx")
    tables = np.load(bundle / "directions.npy", mmap_mode="r"), np.load(bundle / "fold.npy")[:-1]
    images = [pixels.numpy() for pixels in calibration]
    found = measure(bundle / "vision.onnx", path, images, labels, *tables)
    if found.enough:
        return found
    path.unlink()
    path.with_name(f"{path.name}.data").unlink()
    say(
        f"{variant} is left out: on {found.images} images it agrees with float32 in {found.top1:.1%} of the top-1, "
        f"{found.top_features:.1%} of the top features, and its ledgers' cosine is {found.ledger_cosine:.4f}"
    )
    return None


def _write_label_set(clip: Clip, labels: NamedLabels, templates: Sequence[str], path: Path) -> None:
    """NAME.json and NAME.npy for `path` label_sets/NAME; templates: of sets without their own."""
    path.parent.mkdir(exist_ok=True)
    embeddings = clip.encode_labels(list(labels.labels), list(labels.templates or templates))
    np.save(path.with_name(f"{path.name}.npy"), embeddings.numpy())
    path.with_name(f"{path.name}.json").write_text(labels.model_dump_json(exclude_none=True))


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
    for batch, replaced in ((1, _nothing(graph.layers)), (5, _nothing(graph.layers)), (5, some), (5, ~some)):
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


def _nothing(layers: int) -> Tensor:
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
