"""What the commands share: options, errors as messages, loading of the bundle and of CLIP."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrine.commands import completing
from vitrine.commands.streams import is_unread
from vitrine.models.errors import VitrineError
from vitrine.models.files.problems import sentence
from vitrine.models.stopping import Stopped

if TYPE_CHECKING:
    from rich.console import Console

    from vitrine.models.bundle.bundle import Bundle
    from vitrine.models.inputs.skipped import Skipped

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
    "torchvision",
}

DataRoot = Annotated[
    Path, typer.Option("--data-root", envvar="VITRINE_DATA", help="Folder that the recipe's paths are relative to.")
]
PLAIN: dict[str, Any] = {"soft_wrap": True, "highlight": False, "markup": False}  # a line for whoever reads lines
INPUTS = (
    "A folder of images, of tar files or of Parquet files; a text file that lists images, one path per line; one "
    "image, tar or Parquet file; or a pattern for several of them: 'x-{000..003}.tar', 'photos/**/*.jpg'."
)
SkipBroken = Annotated[
    bool,
    typer.Option(
        "--skip-broken-shards", help="Report tar and Parquet files that are damaged or missing, and continue."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe; the value is TOML: training.learning_rate=1e-3 (repeatable).",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Short for --set training.seed=…")]
LabelsList = Annotated[str | None, typer.Option("--labels", help="Comma-separated labels; default: the bundle's.")]
LabelsFile = Annotated[
    Path | None,
    typer.Option(
        "--labels-file", help="Instead of --labels: a text file with one label per line; labels may contain commas."
    ),
]
BundlePath = Annotated[
    Path | None,
    typer.Option(
        "--bundle",
        help="Bundle directory; default: VITRINE_BUNDLE, or the embedded demo.",
        autocompletion=completing.bundles,
    ),
]

EditName = Annotated[
    str | None,
    typer.Option(
        "--edit",
        help="Name of the edit to apply; default: VITRINE_EDIT. none: CLIP unmodified.",
        autocompletion=completing.edits,
    ),
]
LabelSet = Annotated[
    str | None,
    typer.Option(
        "--label-set", help="Instead of --labels: the name of a label set.", autocompletion=completing.label_sets
    ),
]
TemplateList = Annotated[
    list[str] | None,
    typer.Option("--template", help="Sentence with {} for the label (repeatable); default: the bundle's."),
]


class SourceBaseline(StrEnum):
    zero = "zero"
    mean = "mean"


Baseline = Annotated[
    SourceBaseline,
    typer.Option(help="With --sources: zero, or mean, which explains how this image differs from the average one."),
]


def help_of(command: Callable[..., None]) -> str:
    """Its docstring by paragraphs, whose lines the terminal breaks anew: the source's own breaks would stay."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def errors_as_messages(command: Callable[..., None]) -> Callable[..., None]:
    """Print Vitrine's own errors, and what the file system refuses, as one message without a traceback; exit with 1.
    After a signal the same, with 130 or 143."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()  # here, not when Python ends, which could only complain
        except Stopped as stopped:
            raise _failure(str(stopped), stopped.status) from stopped
        except VitrineError as error:
            raise _failure(str(error)) from error
        except OSError as error:
            if is_unread(error):
                raise SystemExit(1) from error
            if (message := sentence(error)) is None:
                raise
            raise _failure(message) from error
        except ModuleNotFoundError as error:
            if error.name not in TRAINING_PACKAGES:
                raise
            raise _failure(f"{error.name} is not installed; this command needs vitrine[cpu,training]") from error

    return run


def _failure(message: str, status: int = 1) -> SystemExit:
    with suppress(OSError):  # nobody reads it
        typer.secho(message if status > 1 else f"error: {message}", fg="red", err=True)
    return SystemExit(status)


def open_bundle_or_default(bundle: Path | None) -> Bundle:
    from vitrine.models.bundle.bundle import open_bundle
    from vitrine.service.operations.settings import load_settings

    return open_bundle(bundle or load_settings().bundle)


def chosen_settings(settings: list[str] | None, seed: int | None) -> list[str]:
    """What --set and --seed say, as KEY=VALUE each."""
    return [*(settings or ()), *([] if seed is None else [f"training.seed={seed}"])]


def chosen_labels(labels: str | None, file: Path | None) -> list[str] | None:
    """What --labels or --labels-file say; None if neither is given. Raises `InputError`."""
    from vitrine.models.inputs.lists import distinct, read_labels

    if labels is not None and file is not None:
        raise typer.BadParameter("give --labels or --labels-file, not both", param_hint="--labels-file")
    if file is not None:
        return list(read_labels(file))
    return None if labels is None else list(distinct(labels.split(","), "--labels"))


def load_clip_of(recipe: Any, data_root: Path) -> Any:
    """The recipe's CLIP."""
    from vitrine.training.checkpoint import load_clip_of as load

    return load(recipe, data_root)


def print_warnings(messages: Iterable[str], console: Console) -> None:
    for message in messages:
        console.print(f"warning: {message}", style="yellow", **PLAIN)


def print_bundle(bundle: Bundle, console: Console) -> None:
    manifest, shape = bundle.manifest, bundle.manifest.shape
    console.print(f"{manifest.name} {bundle.digest[:19]}…  {bundle.path}", style="bold", **PLAIN)
    clt = "no CLT: accounts have the MLPs' rows but no features"
    if manifest.data is not None:
        clt = (
            f"CLT {shape.features:,} features per layer, at most {shape.k} active ({manifest.sparsifier}); "
            f"trained on {manifest.data.name}"
        )
    console.print(
        f"  CLIP {manifest.clip.name} ({manifest.clip.weights}), {shape.layers} layers; {clt}; "
        f"{', '.join(manifest.precisions)}",
        **PLAIN,
    )
    if manifest.residual is not None:
        counts = sorted({f"{count:,}" for count in manifest.residual.features}, key=len)
        console.print(
            f"  residual SAEs: {', '.join(counts)} features per layer; {manifest.residual.bytes / 1e6:.1f} MB", **PLAIN
        )
    has_direct = bundle.encoders is not None or not manifest.has_features
    modes = ["direct"] * has_direct + ["rerun"] * bundle.has_rerun
    console.print(f"  interventions: {' and '.join(modes) or 'none; export the CLIP again to have them'}", **PLAIN)
    for of, cards in (("", manifest.cards), (" of residual SAEs", manifest.residual_cards)):
        if cards is None:
            continue
        quality = cards.quality
        checked = (
            ""
            if quality.auroc_share is None
            else (
                f"; of {quality.measured:,} labels checked on held-out images {quality.auroc_share:.1%} predict when "
                f"the feature fires ({quality.auroc_share_shuffled:.1%} of shuffled labels)"
            )
        )
        console.print(f"  cards: {quality.labelled:,} features{of} have a label{checked}", **PLAIN)


def print_skipped(skipped: Skipped, console: Console) -> None:
    """What was left out of the inputs, a line for each reason."""
    for line in skipped.lines():
        console.print(line, style="yellow", **PLAIN)


def new_console(**options: Any) -> Console:
    from vitrine.models.tables import new_console

    return new_console(**options)
