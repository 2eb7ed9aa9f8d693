"""`vitrine evaluate`: how well a CLT replaces the MLPs, or SAEs the stream, as tables and a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitrine.commands.common import DataRoot, LabelsFile, chosen_labels, load_clip_of, new_console

if TYPE_CHECKING:
    from rich.console import Console

    from vitrine.training.evaluation.results import Results
    from vitrine.training.evaluation.sae_results import SaeResults


def evaluate(
    checkpoint: Annotated[Path, typer.Option(help="A run's folder (its newest checkpoint) or one checkpoint.")],
    data_root: DataRoot = Path("data"),
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results.json and report.html; default: evaluation/ in the checkpoint."),
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=2, help="Number of val images, drawn at random; default: all.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Comma-separated labels; default: the recipe's.")] = None,
    labels_file: LabelsFile = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="For a CLT: another run on the same CLIP to compare with, such as per-layer transcoders."),
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(help="For residual SAEs: a run of a Cross-Layer Transcoder on the same CLIP, to compare with."),
    ] = None,
    curves: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of images for the deletion and insertion curves of several feature rankings; 0: no curves.",
        ),
    ] = 24,
    medians: Annotated[
        int,
        typer.Option(
            min=1,
            help="For residual SAEs: number of train images whose medians replace deleted features (the paper: 1,024).",
        ),
    ] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images per batch.")] = 50,
    workers: Annotated[int, typer.Option(min=0, help="Number of processes that decode images.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the sample, the bootstrap and the random orders.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is a GPU.")] = None,
) -> None:
    """Measure a CLT, or residual SAEs, on val images as its paper does: results.json, tables, and a report.

    --baseline can only be used with a CLT; --beside and --medians only with residual SAEs.
    """
    import torch

    from vitrine.models.files.writing import prepare_folder
    from vitrine.training.checkpoint import latest, read_meta
    from vitrine.training.data.held_out import held_out, train_images
    from vitrine.training.evaluation import residual_sae
    from vitrine.training.evaluation.evaluate import evaluate as run
    from vitrine.training.recipes.recipe import ResidualSaeRecipe
    from vitrine.training.report.report import draw_thumbnails

    named = chosen_labels(labels, labels_file)
    newest, other = latest(checkpoint), latest(baseline) if baseline else None
    meta, console = read_meta(newest), new_console()
    recipe = meta.recipe
    if other and isinstance(recipe, ResidualSaeRecipe):
        raise typer.BadParameter(
            "residual SAEs cannot be compared with a baseline; use --beside", param_hint="--baseline"
        )
    if beside and not isinstance(recipe, ResidualSaeRecipe):
        raise typer.BadParameter(
            "--checkpoint must be a run of residual SAEs, to compare with this CLT", param_hint="--beside"
        )
    out = out or newest / "evaluation"
    prepare_folder(out)
    clip = load_clip_of(recipe, data_root)
    loading = {"batch_size": batch_size, "workers": workers}
    chosen = held_out(
        recipe.data,
        data_root,
        clip,
        images=images,
        seed=seed,
        labels=named or meta.labels or None,
        **loading,
    )
    chosen.data.print_summary(console)
    clip.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(recipe, ResidualSaeRecipe):
        of_medians = (
            train_images(recipe.data, data_root, clip, images=medians, seed=seed, **loading) if curves else None
        )
        of_saes = residual_sae.evaluate(
            clip,
            newest,
            chosen,
            console,
            seed=seed,
            curves=curves,
            of_medians=of_medians,
            beside=latest(beside) if beside else None,
        )
        _write(of_saes, {}, out, console)
    else:
        results = run(clip, newest, chosen, console, other=other, seed=seed, curves=curves)
        _write(results, draw_thumbnails(results, chosen, clip), out, console)
    chosen.data.print_broken(console)


def _write(results: Results | SaeResults, thumbnails: dict[int, str], out: Path, console: Console) -> None:
    from vitrine.models.files.writing import write_text
    from vitrine.training.report.report import write_report
    from vitrine.training.report.sheets import print_sheets

    write_text(out / "results.json", results.model_dump_json(indent=2) + "\n")
    write_report(results, thumbnails, out / "report.html")
    print_sheets(results, console)
    console.print(f"{out / 'results.json'}, {out / 'report.html'}", soft_wrap=True, highlight=False)
