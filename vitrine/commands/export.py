"""`vitrine export`: CLIP and CLT as a bundle, or CLIP alone; residual SAEs beside them or added to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitrine.commands.common import (
    INPUTS,
    PLAIN,
    DataRoot,
    LabelsFile,
    chosen_labels,
    load_clip_of,
    new_console,
    print_bundle,
    print_warnings,
)

BYTES = 4.3  # of a bundle a parameter: weights in float32, and tables; a half of it for weights that are float16's

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from vitrine.models.bundle.bundle import Bundle
    from vitrine.models.bundle.manifest import Data
    from vitrine.models.clip.loading import Clip
    from vitrine.models.export.residual import ResidualExport
    from vitrine.models.progress import Progress
    from vitrine.training.checkpoint import CheckpointMeta
    from vitrine.training.data.held_out import HeldOut


def export(
    out: Annotated[Path, typer.Option(help="The bundle to write; must not exist.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="A CLT's run (its newest checkpoint) or one checkpoint; or --clip or --bundle.")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="In place of --checkpoint a CLIP alone, without features: open_clip's name (ViT-B-32), "
            "hf-hub:org/model, or local-dir:folder."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Of --clip: open_clip's tag (openai), or a file: OpenAI's .pt, safetensors, a state dict, or a "
            "checkpoint of training with one."
        ),
    ] = None,
    quick_gelu: Annotated[
        bool | None,
        typer.Option(
            help="Of --weights, a file: trained with QuickGELU, as OpenAI's were, or with GELU; to be said where "
            "neither the file nor the name (ViT-B-32-quickgelu) does.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Of --clip: what int8 and fp16 must agree with float32 on; without them they are left out. " + INPUTS
        ),
    ] = None,
    residual: Annotated[
        Path | None, typer.Option(help="A run, or one checkpoint, of residual SAEs for the same CLIP, to be added.")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Copy this bundle and add --residual, in place of --checkpoint; its cards of SAEs are left out."
        ),
    ] = None,
    data_root: DataRoot = Path("data"),
    labels: Annotated[
        str | None,
        typer.Option(help="Of the bundle, comma-separated; default: those of the run; of --clip, ImageNet's classes."),
    ] = None,
    labels_file: LabelsFile = None,
    label_sets: Annotated[
        Path | None, typer.Option(help='Folder of NAME.json, {"labels": [...]}: named label sets for the bundle.')
    ] = None,
    calibration_images: Annotated[
        int,
        typer.Option(
            min=2,
            help="Val images, or --images, on which int8 and fp16 must agree with float32; val images' average is the "
            "baseline.",
        ),
    ] = 512,
) -> None:
    """Write CLIP, CLT and residual SAEs as a bundle, checked against torch."""
    if [checkpoint, clip, bundle].count(None) != 2:
        raise typer.BadParameter("give a CLT's --checkpoint, a --clip, or a --bundle that --residual is added to")
    if clip is None and (weights is not None or images is not None or quick_gelu is not None):
        raise typer.BadParameter("--weights, --quick-gelu and --images are of --clip")
    if clip is not None:
        if residual is not None:
            raise typer.BadParameter("--residual is added to a bundle of the CLIP: export it first, then use --bundle")
        names = chosen_labels(labels, labels_file)
        print_bundle(
            _alone(clip, weights, quick_gelu, out, names, label_sets, images, calibration_images), new_console()
        )
        return
    if checkpoint is None:
        if residual is None or labels is not None or labels_file is not None or label_sets is not None:
            raise typer.BadParameter("--bundle goes with --residual and --out alone: the rest is the bundle's own")
        assert bundle is not None
        print_bundle(_added(bundle, residual, out, data_root), new_console())
        return
    import tomli_w

    from vitrine.models.bundle.label_sets import read_label_sets
    from vitrine.models.export.export import Provenance, export_bundle
    from vitrine.models.graph.onnx_file import ExportError
    from vitrine.models.progress import Progress
    from vitrine.training.checkpoint import check_clip, clt_recipe, latest, load_clt
    from vitrine.training.data.held_out import held_out

    default, named = chosen_labels(labels, labels_file), read_label_sets(label_sets) if label_sets else {}
    newest = latest(checkpoint)
    clt, cls_mean, meta = load_clt(newest)
    recipe, console = clt_recipe(newest, meta), new_console()
    loaded = load_clip_of(recipe, data_root)
    check_clip(newest, meta, loaded)
    default = default or list(meta.labels or recipe.data.labels or ())
    if not default:
        raise ExportError(
            f"{newest} was trained without labels, and a bundle needs some to predict where a request brings none: "
            "give --labels or --labels-file"
        )
    if meta.metrics.r2 is None:
        console.print(
            f"{newest} is unfinished (step {meta.step} of {meta.steps}): the bundle has no metrics",
            style="yellow",
            **PLAIN,
        )
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
    added = _residual(residual, loaded) if residual else None
    variants = recipe.bundle.variants
    val = (
        held_out(recipe.data, data_root, loaded, images=calibration_images, labels=meta.labels or None, batch_size=16)
        if variants or recipe.bundle.sources
        else None
    )
    with Progress(console) as progress:
        written = export_bundle(
            loaded,
            clt,
            cls_mean,
            provenance,
            out,
            recipe.bundle.tables,
            named,
            variants,
            _read(val, progress) if val else [],
            recipe.bundle.replacement,
            recipe.bundle.sources,
            recipe.bundle.sources and recipe.bundle.rerun,
            added,
            lambda message: print_warnings([message], console),
            progress,
        )
    print_bundle(written, console)


def _alone(
    name: str,
    weights: str | None,
    quick_gelu: bool | None,
    out: Path,
    labels: list[str] | None,
    label_sets: Path | None,
    images: str | None,
    count: int,
) -> Bundle:
    """Of a CLIP without a CLT."""
    from vitrine.models.bundle.label_sets import read_label_sets
    from vitrine.models.clip.loading import load_clip
    from vitrine.models.export.clip_alone import export_clip, read_images
    from vitrine.models.export.export import check_new
    from vitrine.models.inputs.opening import open_inputs
    from vitrine.models.progress import Progress

    check_new(out)
    console, named = new_console(), read_label_sets(label_sets) if label_sets else {}
    inputs = open_inputs(images) if images is not None else None

    def log(message: str) -> None:
        print_warnings([message], console)

    _announce(name, weights, console)
    with Progress(console) as progress:
        progress.begin(f"loading {name}" + ("" if _is_file(weights) else ", downloading it if it is not there yet"))
        clip = load_clip(name, weights, quick_gelu=quick_gelu)
        pixels = read_images(inputs, count, clip, log, progress) if inputs is not None else []
        return export_clip(clip, out, labels, named, pixels, log, progress)


def _is_file(weights: str | None) -> bool:
    return weights is not None and Path(weights).is_file()


def _announce(name: str, weights: str | None, console: Console) -> None:
    """Print what it will take, of a CLIP whose size is known before it is loaded."""
    from vitrine.training.recipes.clip_shape import UnknownShape, clip_shape
    from vitrine.training.recipes.recipe import ClipSection

    try:
        parameters = clip_shape(ClipSection(name=name, weights=weights), Path()).parameters / 1e6
    except UnknownShape:  # it brings its own configuration, or is refused below with the reason
        return
    download = f"{4 * parameters:,.0f} MB of weights to download unless they are in the hub's cache, and "
    console.print(
        f"{name}: {parameters:,.0f} million parameters, so {'' if _is_file(weights) else download}a bundle of up to "
        f"{BYTES * parameters:,.0f} MB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _added(bundle: Path, residual: Path, out: Path, data_root: Path) -> Bundle:
    """A copy of a bundle, with residual SAEs."""
    from vitrine.models.bundle.bundle import open_bundle
    from vitrine.models.export.residual import add_residual
    from vitrine.training.checkpoint import latest, read_meta

    clip = load_clip_of(read_meta(latest(residual)).recipe, data_root)
    return add_residual(open_bundle(bundle), clip, _residual(residual, clip), out)


def _residual(checkpoint: Path, clip: Clip) -> ResidualExport:
    """Residual SAEs of this CLIP, as they are to be exported."""
    import tomli_w

    from vitrine.models.export.residual import ResidualExport
    from vitrine.training.checkpoint import check_clip, latest, load_residual_saes

    newest = latest(checkpoint)
    saes, meta = load_residual_saes(newest)
    check_clip(newest, meta, clip)
    recipe = tomli_w.dumps(meta.recipe.model_dump(exclude_none=True))
    return ResidualExport(saes, _data(meta), recipe, meta.metrics)


def _data(meta: CheckpointMeta) -> Data:
    """What a run was trained and measured on."""
    from vitrine.models.bundle.manifest import Data

    section = meta.recipe.data
    return Data(name=section.name, licence=section.licence, train_images=meta.train_images, val_images=meta.val_images)


def _read(val: HeldOut, progress: Progress) -> list[Tensor]:
    """The images on which variants must agree and whose average is the baseline, as batches of normalised pixels."""
    task, images = progress.task("images to check on", len(val), "images"), []
    for pixels, _ in val.batches():
        images.append(pixels)
        task.advance(len(pixels))
    return images
