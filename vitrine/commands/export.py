"""`vitrine export`: CLIP and CLT as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitrine.commands.common import (
    DataRoot,
    LabelsFile,
    chosen_labels,
    load_clip_of,
    new_console,
    print_bundle,
    print_warnings,
)

if TYPE_CHECKING:
    from torch import Tensor

    from vitrine.models.progress import Progress
    from vitrine.training.data.held_out import HeldOut


def export(
    checkpoint: Annotated[Path, typer.Option(help="A run's folder (its newest checkpoint) or one checkpoint.")],
    out: Annotated[Path, typer.Option(help="The bundle to write; must not exist.")],
    data_root: DataRoot = Path("data"),
    labels: Annotated[
        str | None, typer.Option(help="Of the bundle, comma-separated; default: those of the run.")
    ] = None,
    labels_file: LabelsFile = None,
    label_sets: Annotated[
        Path | None, typer.Option(help='Folder of NAME.json, {"labels": [...]}: named label sets for the bundle.')
    ] = None,
    calibration_images: Annotated[
        int,
        typer.Option(
            min=2, help="Val images on which int8 and fp16 must agree with float32; their average is the baseline."
        ),
    ] = 512,
) -> None:
    """Write CLIP and CLT as a bundle, checked against torch."""
    import tomli_w

    from vitrine.models.bundle.label_sets import read_label_sets
    from vitrine.models.bundle.manifest import Data
    from vitrine.models.export.export import Provenance, export_bundle
    from vitrine.models.graph.onnx_file import ExportError
    from vitrine.models.progress import Progress
    from vitrine.training.checkpoint import check_clip, clt_recipe, latest, load_clt
    from vitrine.training.data.held_out import held_out

    default, named = chosen_labels(labels, labels_file), read_label_sets(label_sets) if label_sets else {}
    newest = latest(checkpoint)
    clt, cls_mean, meta = load_clt(newest)
    recipe, console = clt_recipe(newest, meta), new_console()
    clip = load_clip_of(recipe, data_root)
    check_clip(newest, meta, clip)
    default = default or list(meta.labels or recipe.data.labels or ())
    if not default:
        raise ExportError(
            f"{newest} was trained without labels, and a bundle needs some to predict where a request brings none: "
            "give --labels or --labels-file"
        )
    if meta.metrics.r2 is None:
        console.print(f"[yellow]{newest} is unfinished (step {meta.step} of {meta.steps}): the bundle has no metrics")
    data = Data(
        name=recipe.data.name,
        licence=recipe.data.licence,
        train_images=meta.train_images,
        val_images=meta.val_images,
    )
    provenance = Provenance(
        name=recipe.name,
        description=recipe.bundle.description,
        labels=default,
        templates=recipe.data.templates,
        data=data,
        recipe=tomli_w.dumps(recipe.model_dump(exclude_none=True)),
        metrics=meta.metrics,
        licence=recipe.bundle.licence,
    )
    variants = recipe.bundle.variants
    val = (
        held_out(recipe.data, data_root, clip, images=calibration_images, labels=meta.labels or None, batch_size=16)
        if variants or recipe.bundle.sources
        else None
    )
    with Progress(console) as progress:
        images = _read(val, progress) if val else []
        bundle = export_bundle(
            clip,
            clt,
            cls_mean,
            provenance,
            out,
            recipe.bundle.tables,
            named,
            variants,
            images,
            recipe.bundle.replacement,
            recipe.bundle.sources,
            lambda message: print_warnings([message], console),
            progress,
        )
    print_bundle(bundle, console)


def _read(val: HeldOut, progress: Progress) -> list[Tensor]:
    """The images on which variants must agree and whose average is the baseline, as batches of normalised pixels."""
    task, images = progress.task("images to check on", len(val), "images"), []
    for pixels, _ in val.batches():
        images.append(pixels)
        task.advance(len(pixels))
    return images
