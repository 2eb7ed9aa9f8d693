"""`vitrine export`: CLIP and CLT as a bundle, or only CLIP; residual SAEs with them or added to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitrine.commands.common import (
    INPUTS,
    DataRoot,
    LabelsFile,
    chosen_labels,
    new_console,
    print_bundle,
    print_warnings,
)

BYTES = 4.3  # of a bundle a parameter: weights in float32, and tables; a half of it for weights that are float16's

if TYPE_CHECKING:
    from rich.console import Console

    from vitrine.models.bundle.bundle import Bundle


def export(
    out: Annotated[Path, typer.Option(help="The bundle to write; must not exist.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A CLT's run (its newest checkpoint) or one checkpoint; or give --clip or --bundle."),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="Instead of --checkpoint: only a CLIP, without features: open_clip's name (ViT-B-32), "
            "hf-hub:org/model, "
            "or local-dir:folder."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="With --clip: open_clip's tag (openai), or a file: OpenAI's .pt, safetensors, a state dict, or a "
            "training checkpoint that contains one."
        ),
    ] = None,
    quick_gelu: Annotated[
        bool | None,
        typer.Option(
            help="With a file of --weights: trained with QuickGELU, like OpenAI's, or with GELU; required if "
            "neither the file nor the name (ViT-B-32-quickgelu) shows it.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="With --clip: images on which int8 and fp16 must agree with float32; without images, the bundle has "
            "only float32. " + INPUTS
        ),
    ] = None,
    residual: Annotated[
        Path | None,
        typer.Option(help="A run, or one checkpoint, of residual SAEs for the same CLIP, to add to the bundle."),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --checkpoint: copy this bundle and add --residual; its cards of SAEs are left out."
        ),
    ] = None,
    data_root: DataRoot = Path("data"),
    labels: Annotated[
        str | None,
        typer.Option(
            help="The bundle's labels, comma-separated; default: those of the run, or with --clip ImageNet's classes."
        ),
    ] = None,
    labels_file: LabelsFile = None,
    label_sets: Annotated[
        Path | None, typer.Option(help='Folder of label sets for the bundle: files NAME.json with {"labels": [...]}.')
    ] = None,
    calibration_images: Annotated[
        int,
        typer.Option(
            min=2,
            help="Number of val images, or of --images, on which int8 and fp16 must agree with float32; the average of "
            "the val images becomes the baseline.",
        ),
    ] = 512,
) -> None:
    """Write CLIP, CLT and residual SAEs as a bundle, and check its graphs against torch."""
    if [checkpoint, clip, bundle].count(None) != 2:
        raise typer.BadParameter("give one of --checkpoint (a CLT), --clip, and --bundle (with --residual to add)")
    if clip is None and (weights is not None or images is not None or quick_gelu is not None):
        raise typer.BadParameter("--weights, --quick-gelu and --images require --clip")
    if clip is not None:
        if residual is not None:
            raise typer.BadParameter(
                "--residual cannot be used with --clip: export the CLIP first, then use --bundle with --residual"
            )
        names = chosen_labels(labels, labels_file)
        print_bundle(
            _alone(clip, weights, quick_gelu, out, names, label_sets, images, calibration_images), new_console()
        )
        return
    if checkpoint is None:
        if residual is None or labels is not None or labels_file is not None or label_sets is not None:
            raise typer.BadParameter(
                "--bundle requires --residual, and takes no labels: the copy keeps the bundle's own"
            )
        assert bundle is not None
        console = new_console()
        print_bundle(_added(bundle, residual, out, data_root, console), console)
        return
    from vitrine.models.bundle.label_sets import read_label_sets
    from vitrine.models.progress import Progress
    from vitrine.training.export import export_checkpoint

    default, console = chosen_labels(labels, labels_file), new_console()
    with Progress(console) as progress:
        written = export_checkpoint(
            checkpoint,
            data_root,
            out,
            labels=default,
            label_sets=read_label_sets(label_sets) if label_sets else {},
            residual=residual,
            images=calibration_images,
            log=lambda message: print_warnings([message], console),
            progress=progress,
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
        progress.begin(f"loading {name}" + ("" if _is_file(weights) else ", downloading it if necessary"))
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


def _added(bundle: Path, residual: Path, out: Path, data_root: Path, console: Console) -> Bundle:
    """A copy of a bundle, with residual SAEs."""
    from vitrine.models.bundle.bundle import open_bundle
    from vitrine.models.export.residual import add_residual
    from vitrine.models.progress import Progress
    from vitrine.training.checkpoint import latest, load_clip_of, read_meta
    from vitrine.training.export import residual_export

    with Progress(console) as progress:
        progress.begin("loading the CLIP")
        clip = load_clip_of(read_meta(latest(residual)).recipe, data_root)
        progress.begin("exporting residual SAEs, and checking their graphs against torch")
        return add_residual(open_bundle(bundle), clip, residual_export(residual, clip), out)
