"""From a checkpoint to a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tomli_w
from torch import Tensor

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.label_sets import NamedLabels
from vitrine.models.bundle.manifest import Data
from vitrine.models.clip.loading import Clip
from vitrine.models.export.export import Provenance, export_bundle
from vitrine.models.export.residual import ResidualExport
from vitrine.models.graph.onnx_file import ExportError
from vitrine.models.progress import Progress
from vitrine.training.checkpoint import (
    CheckpointMeta,
    check_clip,
    clt_recipe,
    latest,
    load_clip_of,
    load_clt,
    load_residual_saes,
)
from vitrine.training.data.held_out import HeldOut, held_out
from vitrine.training.evaluation.evaluate import cls_warning


def export_checkpoint(
    checkpoint: Path,
    data_root: Path,
    out: Path,
    *,
    log: Callable[[str], None],
    progress: Progress,
    labels: Sequence[str] | None = None,
    label_sets: Mapping[str, NamedLabels] | None = None,
    residual: Path | None = None,
    images: int = 512,
) -> Bundle:
    """A CLT's run (its newest checkpoint), or one checkpoint, as a bundle at `out`, which must not exist.

    Args:
        data_root: what the paths of the recipe are relative to.
        log: takes warnings.
        labels: of the bundle; default: those of the run.
        residual: a run, or one checkpoint, of residual SAEs for the same CLIP, to be added.
        images: val images on which variants must agree with float32, and whose average is the baseline.

    Raises `CheckpointError`, `ExportError`, and what loading CLIP and images raises.
    """
    newest = latest(checkpoint)
    clt, cls_mean, meta = load_clt(newest)
    recipe = clt_recipe(newest, meta)
    clip = load_clip_of(recipe, data_root)
    check_clip(newest, meta, clip)
    default = list(labels or meta.labels or recipe.data.labels or ())
    if not default:
        raise ExportError(
            f"{newest} was trained without labels, but a bundle needs default labels for requests that give none: "
            f"give `vitrine export` --labels or --labels-file"
        )
    if meta.metrics.r2 is None:
        log(f"{newest} is not finished (step {meta.step} of {meta.steps}): the bundle will have no metrics")
    if message := cls_warning(meta.metrics, recipe):
        log(message)
    provenance = Provenance(
        name=recipe.name,
        description=recipe.bundle.description,
        labels=default,
        templates=recipe.data.templates,
        data=_data(meta),
        recipe=tomli_w.dumps(recipe.model_dump(exclude_none=True)),
        metrics=meta.metrics,
        licence=recipe.bundle.licence,
    )
    added = residual_export(residual, clip) if residual else None
    variants = recipe.bundle.variants
    val = (
        held_out(recipe.data, data_root, clip, images=images, labels=meta.labels or None, batch_size=16)
        if variants or recipe.bundle.sources
        else None
    )
    pixels = _read(val, progress) if val else []
    if val and (message := val.data.broken_line()):
        log(message)
    return export_bundle(
        clip,
        clt,
        cls_mean,
        provenance,
        out,
        recipe.bundle.tables,
        label_sets or {},
        variants,
        pixels,
        recipe.bundle.replacement,
        recipe.bundle.sources,
        recipe.bundle.sources and recipe.bundle.rerun,
        added,
        log,
        progress,
    )


def residual_export(checkpoint: Path, clip: Clip) -> ResidualExport:
    """Residual SAEs of this CLIP, as they are to be exported. Raises `CheckpointError`."""
    newest = latest(checkpoint)
    saes, meta = load_residual_saes(newest)
    check_clip(newest, meta, clip)
    recipe = tomli_w.dumps(meta.recipe.model_dump(exclude_none=True))
    return ResidualExport(saes, _data(meta), recipe, meta.metrics)


def _data(meta: CheckpointMeta) -> Data:
    """What a run was trained and measured on."""
    section = meta.recipe.data
    return Data(name=section.name, licence=section.licence, train_images=meta.train_images, val_images=meta.val_images)


def _read(val: HeldOut, progress: Progress) -> list[Tensor]:
    """The images on which variants must agree and whose average is the baseline, as batches of normalised pixels."""
    task, images = progress.task("images to check on", len(val), "images"), []
    for pixels, _ in val.batches():
        images.append(pixels)
        task.advance(len(pixels))
    return images
