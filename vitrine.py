"""The `vitrine` command. Every sub-command imports what it needs when it runs: serving never loads torch."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.errors import VitrineError

if TYPE_CHECKING:
    from rich.console import Console

    from models.bundle import Bundle

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="CLIP predictions with an exact account of what made them: train, evaluate, export, verify, serve, attribute.",
)

TRAINING_PACKAGES = {
    "datasets",
    "jinja2",
    "lightning_fabric",
    "matplotlib",
    "onnx",
    "open_clip",
    "open_clip_train",
    "pyarrow",
    "safetensors",
    "scipy",
    "tensorboard",
    "tomli_w",
    "torch",
    "torchmetrics",
    "torchvision",
}

DataRoot = Annotated[
    Path, typer.Option("--data-root", envvar="VITRINE_DATA", help="Folder that the recipe's paths are relative to.")
]
BundlePath = Annotated[
    Path | None, typer.Option("--bundle", help="Bundle directory; default: VITRINE_BUNDLE, or the embedded demo.")
]


def _mendable(command: Callable[..., None]) -> Callable[..., None]:
    """Print Vitrine's own errors as one message, without a traceback, and exit with 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except VitrineError as error:
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from error
        except ModuleNotFoundError as error:
            if error.name not in TRAINING_PACKAGES:
                raise
            typer.secho(
                f"error: {error.name} is not installed; this command needs vitrine[cpu,training]", fg="red", err=True
            )
            raise typer.Exit(1) from error

    return run


@app.command(
    epilog="Example: vitrine pretrain --recipe training/recipes/clip/demo.toml --data-root data --out data/demo-clip"
)
@_mendable
def pretrain(
    recipe: Annotated[Path, typer.Option(help="Recipe (TOML) of a CLIP, see training/recipes/clip/.")],
    out: Annotated[Path, typer.Option(help="Folder of the CLIP; a run found there is taken up.")],
    data_root: DataRoot = Path("data"),
) -> None:
    """Train a small CLIP from scratch, for the demo; resumes by itself."""
    from training.pretrain import PretrainRecipe
    from training.pretrain import pretrain as run
    from training.recipes import read_toml

    console = _console()
    weights = run(read_toml(recipe, PretrainRecipe), data_root, out, console)
    console.print(f"CLIP: {weights}")


@app.command(epilog="Example: vitrine train --recipe demo --data-root data --out runs/demo")
@_mendable
def train(
    recipe: Annotated[str, typer.Option(help="A recipe's name (see vitrine recipes), or its file.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; a run found there is taken up.")],
    data_root: DataRoot = Path("data"),
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps, with a checkpoint.")] = None,
    devices: Annotated[
        int, typer.Option(min=1, help="GPUs (or CPU processes). On several machines start this with torchrun.")
    ] = 1,
    shard: Annotated[
        bool, typer.Option(help="Share weights out over the devices, for CLTs too large for one.")
    ] = False,
    accelerator: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    wandb: Annotated[str | None, typer.Option(help="Log to this Weights & Biases project, too.")] = None,
) -> None:
    """Train a CLT on a CLIP's activations; resumes by itself. Curves: tensorboard --logdir OUT."""
    from training.catalogue import find_recipe
    from training.parallel import make_fabric
    from training.recipes import load_recipe
    from training.run import train as run

    loaded, console = load_recipe(find_recipe(recipe)), _console()
    fabric = make_fabric(devices, shard, loaded.training.precision, accelerator)
    fabric.launch()
    checkpoint = run(
        loaded, _load_clip(loaded, data_root), data_root, out, console, fabric, max_steps=max_steps, wandb_project=wandb
    )
    if fabric.is_global_zero:
        console.print(f"checkpoint: {checkpoint}")


@app.command(epilog="Example: vitrine evaluate --checkpoint runs/demo --data-root data --baseline runs/per-layer")
@_mendable
def evaluate(
    checkpoint: Annotated[Path, typer.Option(help="A run's folder (its newest checkpoint) or one checkpoint.")],
    data_root: DataRoot = Path("data"),
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results.json and report.html; default: evaluation/ in the checkpoint."),
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=2, help="A random sample of so many val images; default: all.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Another run on the same CLIP to compare with: per-layer transcoders.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 50,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the sample, the bootstrap and the random orders.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Measure a CLT as the paper does, on val images: results.json, tables, and a report to look at."""
    import torch

    from training.checkpoint import latest, read_meta
    from training.evaluate import evaluate as run
    from training.evaluation.held_out import held_out
    from training.evaluation.tables import print_sheets
    from training.report import draw_thumbnails, write_report

    found, other = latest(checkpoint), latest(baseline) if baseline else None
    recipe, console = read_meta(found).recipe, _console()
    clip = _load_clip(recipe, data_root)
    options = {"batch_size": batch_size, "workers": workers}
    chosen = held_out(recipe.data, data_root, clip, images=images, seed=seed, **options)
    clip.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    results = run(clip, found, chosen, console, other=other, seed=seed)
    out = out or found / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")
    write_report(results, draw_thumbnails(results, chosen, clip), out / "report.html")
    print_sheets(results, console)
    console.print(f"{out / 'results.json'}, {out / 'report.html'}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: vitrine recipes b32-cifar100-relu_topk")
@_mendable
def recipes(
    name: Annotated[str | None, typer.Argument(help="One in detail: a shipped one's name, or a TOML file.")] = None,
    data_root: DataRoot = Path("data"),
    share: Annotated[float, typer.Option(min=0.01, max=1, help="Of a GPU's peaks that a run reaches.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """List the recipes that come with Vitrine: parameters, memory, FLOPs and hours on named GPUs, as estimates."""
    import json

    from training.catalogue import describe, find_recipe, print_list, print_one, shipped

    path = find_recipe(name) if name else None
    if as_json:
        found = describe(path, data_root, share) if path else [describe(one, data_root, share) for one in shipped()]
        typer.echo(json.dumps(found, indent=2))
    elif path:
        print_one(path, data_root, share, _console())
    else:
        print_list(data_root, share, _console())


@app.command(epilog="Example: vitrine export --checkpoint runs/demo --data-root data --out bundles/demo")
@_mendable
def export(
    checkpoint: Annotated[Path, typer.Option(help="A run's folder (its newest checkpoint) or one checkpoint.")],
    out: Annotated[Path, typer.Option(help="The bundle to write; must not exist.")],
    data_root: DataRoot = Path("data"),
    label_sets: Annotated[
        Path | None, typer.Option(help='Folder of NAME.json, {"labels": [...]}: named label sets for the bundle.')
    ] = None,
    calibration_images: Annotated[
        int, typer.Option(min=2, help="Val images on which int8 and fp16 must agree with float32.")
    ] = 512,
) -> None:
    """Write CLIP and CLT as a bundle, checked against torch."""
    import tomli_w

    from models.bundle import Data
    from models.export import Provenance, export_bundle
    from models.label_sets import read_label_sets
    from training.checkpoint import check_clip, latest, load_clt
    from training.evaluation.held_out import held_out

    named = read_label_sets(label_sets) if label_sets else {}
    found = latest(checkpoint)
    clt, cls_mean, meta = load_clt(found)
    recipe, console = meta.recipe, _console()
    clip = _load_clip(recipe, data_root)
    check_clip(found, meta, clip)
    if meta.metrics.r2 is None:
        console.print(f"[yellow]{found} is unfinished (step {meta.step} of {meta.steps}): the bundle has no metrics")
    data = Data(
        name=recipe.data.name,
        licence=recipe.data.licence,
        train_images=meta.train_images,
        val_images=meta.val_images,
    )
    provenance = Provenance(
        name=recipe.name,
        description=recipe.bundle.description,
        labels=meta.labels,
        templates=recipe.data.templates,
        data=data,
        recipe=tomli_w.dumps(recipe.model_dump(exclude_none=True)),
        metrics=meta.metrics,
        licence=recipe.bundle.licence,
    )
    variants = recipe.bundle.variants
    val = held_out(recipe.data, data_root, clip, images=calibration_images, batch_size=16) if variants else None
    with console.status("exporting and checking against torch"):
        bundle = export_bundle(
            clip,
            clt,
            cls_mean,
            provenance,
            out,
            recipe.bundle.tables,
            named,
            variants,
            [pixels for pixels, _ in val.batches()] if val else [],
            recipe.bundle.replacement,
            console.print,
        )
    _print_bundle(bundle, console)


@app.command(epilog="Example: vitrine cards --checkpoint runs/b32 --bundle bundles/b32 --out bundles/b32-cards")
@_mendable
def cards(
    checkpoint: Annotated[Path, typer.Option(help="A run's folder (its newest checkpoint) or one checkpoint.")],
    bundle: Annotated[Path, typer.Option(help="The bundle that was exported from it.")],
    out: Annotated[Path, typer.Option(help="The bundle to write, with cards; an interrupted call is taken up.")],
    data_root: DataRoot = Path("data"),
    images: Annotated[int, typer.Option(min=2, help="Train images that exemplars are chosen from.")] = 15_000,
    held_out: Annotated[
        int, typer.Option(min=4, help="Val images: half calibrate the labels, half check them.")
    ] = 5_000,
    vocabulary: Annotated[
        list[str] | None,
        typer.Option(
            help="labels, imagenet, colours, textures, or a file with a word a line (repeatable); default: all."
        ),
    ] = None,
    pictures: Annotated[
        str, typer.Option(help="thumbnails of the images, means of a feature's exemplars, or none: mind their licence.")
    ] = "thumbnails",
    references: Annotated[int, typer.Option(min=0, help="Images that /v1/similar finds the nearest among.")] = 2_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the samples and the random sets that labels must beat.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Describe what every feature fires on: labels where they are earned, exemplars, statistics; checked on val."""
    from typing import get_args

    import torch

    from models.bundle import open_bundle
    from training.cards.build import Options, build_cards
    from training.cards.pictures import Pictures
    from training.checkpoint import latest, read_meta

    if pictures not in get_args(Pictures):
        raise typer.BadParameter(f"{pictures!r} is none of {', '.join(get_args(Pictures))}", param_hint="--pictures")
    found, console = latest(checkpoint), _console()
    clip = _load_clip(read_meta(found).recipe, data_root)
    clip.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = Options(
        images=images,
        held_out=held_out,
        pictures=pictures,  # type: ignore[arg-type]
        references=references,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
    )
    if vocabulary:
        options = replace(options, vocabulary=tuple(vocabulary))
    made = build_cards(clip, found, open_bundle(bundle), data_root, out, options, console)
    _print_bundle(made, console)


@app.command(epilog="Example: vitrine verify models/demo")
@_mendable
def verify(bundle: Annotated[Path, typer.Argument(help="Bundle directory.")]) -> None:
    """Check a bundle: every file's sha256, that its graphs run, and that the account adds up."""
    from service.verify import verify as run

    opened, console = run(bundle), _console()
    _print_bundle(opened, console)
    console.print("[green]all files as the manifest says; the graphs run and their rows add up")


@app.command(epilog="Example: vitrine serve --bundle models/demo --port 3000")
@_mendable
def serve(
    bundle: BundlePath = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 3000,
) -> None:
    """Serve a bundle over HTTP with BentoML (settings: service/README.md)."""
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # BentoML reads it when it is imported
    from service.reload import read_keys
    from service.runtime import choose
    from service.settings import load_settings

    settings, opened = load_settings(), _open(bundle)
    choose(opened, settings)  # here, and not in a worker that the server would start again and again
    read_keys(settings)
    os.environ["VITRINE_BUNDLE"] = str(opened.path.absolute())  # links stay: a reload follows them anew
    from service.supervisor import serve as run

    _print_bundle(opened, _console())
    sys.stdout.flush()
    run(host, port)


@app.command(epilog="Example: vitrine doctor --bundle bundles/b32")
@_mendable
def doctor(bundle: BundlePath = None) -> None:
    """What the service would run on with the present settings, and why; then one inference to prove it."""
    import numpy as np
    import onnxruntime
    from rich import box
    from rich.table import Table

    from models.bundle import vision_file
    from service.engine import Engine
    from service.runtime import available_processors, int8_instructions
    from service.settings import load_settings

    settings, opened, console = load_settings(), _open(bundle), _console()
    engine = Engine(opened, settings)
    runtime = engine.runtime
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("what", "is", "because"):
        table.add_column(heading, overflow="fold")
    processors, why = available_processors()
    rows = [
        ("bundle", f"{opened.manifest.name} {opened.digest[:19]}…", str(opened.path)),
        ("ONNX Runtime", onnxruntime.__version__, f"has {', '.join(onnxruntime.get_available_providers())}"),
        ("provider", runtime.provider, runtime.reasons["provider"]),
        ("precision", runtime.precision, runtime.reasons["precision"]),
        ("graph", vision_file(runtime.precision), f"the bundle has {', '.join(opened.manifest.precisions)}"),
        ("int8 instructions", int8_instructions() or "none", "/proc/cpuinfo"),
        ("processors", str(processors), why),
        ("threads", str(runtime.threads), runtime.reasons["threads"]),
        ("batches", ", ".join(map(str, engine.batches)), f"warmed up; VITRINE_BATCH_SIZE={settings.batch_size}"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    engine.warm_up()
    pixels = np.zeros((1, 3, *opened.manifest.preprocessing.size), np.float32)
    start = perf_counter()
    engine.explain(pixels)
    console.print(f"[green]the graphs run; one image took {(perf_counter() - start) * 1e3:.1f} ms")


@app.command(epilog="Example: vitrine replay photos --bundle models/demo --images 200")
@_mendable
def replay(
    folder: Annotated[Path, typer.Argument(help="Of images, or of one folder of images a label.")],
    bundle: BundlePath = None,
    images: Annotated[int | None, typer.Option(min=1, help="A random sample of so many; default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, with C's matrix.")] = None,
) -> None:
    """Predict images with CLIP's MLPs replaced by the bundle's features: how well do these stand for those, there?"""
    from rich.progress import track

    from service.engine import Engine
    from service.images import ImageLimits
    from service.replay import print_replay
    from service.replay import replay as run
    from service.settings import load_settings

    settings, console = load_settings(), _console()
    engine = Engine(_open(bundle), settings.model_copy(update={"replacement": True}))
    limits = ImageLimits(settings.max_image_pixels, settings.max_image_side)
    found = run(
        engine,
        folder,
        limits,
        images,
        seed,
        lambda batches: track(batches, "replay", console=console, transient=True),
    )
    if json_file is not None:
        json_file.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    print_replay(found, console)


@app.command(epilog="Example: vitrine bulk photos --out answers --labels cat,dog")
@_mendable
def bulk(
    inputs: Annotated[str, typer.Argument(help="A folder, a list (text file), x.parquet or 'x-{000..003}.tar'.")],
    out: Annotated[Path, typer.Option(help="Folder of Parquet parts; a run found there is taken up.")],
    column: Annotated[str | None, typer.Option(help="Of Parquet inputs: image bytes, or paths.")] = None,
    labels: Annotated[str | None, typer.Option(help="Comma-separated; default: the bundle's labels.")] = None,
    label_set: Annotated[str | None, typer.Option(help="A named label set instead.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Sentence with {} (repeatable); default: the bundle's.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Predictions listed.")] = 5,
    features: Annotated[int, typer.Option(min=0, help="Features listed, of all layers together.")] = 5,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: VITRINE_BATCH_SIZE.")] = None,
    part_size: Annotated[int, typer.Option(min=1, help="Images in one Parquet file.")] = 512,
    ray: Annotated[int, typer.Option(min=0, help="Processes of Ray's (vitrine[bulk]); 0: this one alone.")] = 0,
    bundle: BundlePath = None,
) -> None:
    """Account for many images, without a server: Parquet tables. Run it again to take up a run that was cut off."""
    from service.bulk.inputs import open_source
    from service.bulk.job import make_job
    from service.bulk.run import Work
    from service.bulk.run import bulk as run
    from service.schemas import AttributeRequest, validated
    from service.settings import load_settings

    fields: dict[str, Any] = {"label_set": label_set, "templates": template, "top_k": top_k}
    fields |= {"explain": {"features": features}, "labels": labels.split(",") if labels is not None else None}
    request, settings, opened, console = validated(AttributeRequest, fields), load_settings(), _open(bundle), _console()
    if batch_size is not None:
        settings = settings.model_copy(update={"batch_size": batch_size})
    source = open_source(inputs, column)
    job = make_job(opened, settings, source, request, path=inputs, column=column, part_size=part_size)
    found = run(opened, Work(job, source, out, settings), console, ray)
    console.print(f"{found.rows:,} rows and {found.problems:,} errors in {out}", highlight=False)


@app.command(epilog="Example: vitrine attribute photo.jpg --labels cat,dog,truck --contrast dog")
@_mendable
def attribute(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JPEG, PNG, WebP, GIF or BMP.")],
    labels: Annotated[str | None, typer.Option(help="Comma-separated; default: the bundle's labels.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Label to explain (repeatable); default: top-1.")] = None,
    contrast: Annotated[str | None, typer.Option(help="Explain each target rather than this label.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Predictions listed.")] = 5,
    features: Annotated[int, typer.Option(min=0, help="Features listed per layer.")] = 3,
    bundle: BundlePath = None,
    as_json: Annotated[bool, typer.Option("--json", help="The service's JSON instead of tables.")] = False,
    svg: Annotated[
        typer.FileTextWrite | None, typer.Option(encoding="utf-8", help="The tables as a picture too, in this file.")
    ] = None,
    html: Annotated[
        typer.FileTextWrite | None,
        typer.Option(encoding="utf-8", help="The account with photo, heat map and cards as one page, in this file."),
    ] = None,
    graph: Annotated[
        Path | None,
        typer.Option(help="The account as circuit-tracer and Neuronpedia read it, NAME.json; features beside it."),
    ] = None,
) -> None:
    """Predict one image's label and print the account of it, without a server."""
    from service.exports import account_for
    from service.render import draw_answer, print_answer
    from service.schemas import AttributeRequest, validated

    fields: dict[str, Any] = {"top_k": top_k, "explain": {"contrast": contrast, "features": features}}
    if labels is not None:
        fields["labels"] = labels.split(",")
    if target:
        fields["explain"]["targets"] = target
    request, opened = validated(AttributeRequest, fields), _open(bundle)
    answer, page = asyncio.run(account_for(opened, image, request, with_page=html is not None, graph=graph))
    if as_json:
        typer.echo(answer.model_dump_json(indent=2))
    else:
        print_answer(answer, _console())
    if svg is not None:
        svg.write(draw_answer(answer))
    if html is not None:
        html.write(page)


def _open(bundle: Path | None) -> Bundle:
    from models.bundle import open_bundle
    from service.settings import load_settings

    return open_bundle(bundle or load_settings().bundle)


def _load_clip(recipe: Any, data_root: Path) -> Any:
    """The recipe's CLIP; its weights are a file under the data root if there is one of that name, else a tag."""
    from models.clip import load_clip

    clip = recipe.clip
    config = data_root / clip.config if clip.config else None
    weights = clip.weights
    if weights and (data_root / weights).is_file():
        weights = str(data_root / weights)
    return load_clip(clip.name, weights, config)


def _print_bundle(bundle: Bundle, console: Console) -> None:
    manifest, shape = bundle.manifest, bundle.manifest.shape
    plain: dict[str, Any] = {"soft_wrap": True, "highlight": False, "markup": False}
    console.print(f"{manifest.name} {bundle.digest[:19]}…  {bundle.path}", style="bold", **plain)
    console.print(
        f"  CLIP {manifest.clip.name} ({manifest.clip.weights}), {shape.layers} layers; "
        f"CLT {shape.features:,} features a layer, at most {shape.k} active ({manifest.sparsifier}); "
        f"trained on {manifest.data.name}; {', '.join(manifest.precisions)}",
        **plain,
    )
    if manifest.cards is not None:
        quality = manifest.cards.quality
        checked = (
            ""
            if quality.auroc_share is None
            else (
                f"; of {quality.measured:,} checked on held-out images {quality.auroc_share:.1%} tell when they fire "
                f"({quality.auroc_share_shuffled:.1%} shuffled)"
            )
        )
        console.print(f"  cards: {quality.labelled:,} features have a label{checked}", **plain)


def _console() -> Console:
    from rich.console import Console

    return Console()


if __name__ == "__main__":
    app()
