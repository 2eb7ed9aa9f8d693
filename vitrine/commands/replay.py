"""`vitrine replay`: predictions with CLIP's MLPs replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrine.commands.common import (
    INPUTS,
    BundlePath,
    LabelsFile,
    SkipBroken,
    chosen_labels,
    new_console,
    open_bundle_or_default,
)


def replay(
    inputs: Annotated[
        str, typer.Argument(help=f"{INPUTS} A folder with one subfolder per label also gives accuracies.")
    ],
    column: Annotated[
        str | None, typer.Option(help="With Parquet files: the column of image bytes, or of paths.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Comma-separated labels; default: the names of the subfolders, or the bundle's labels."),
    ] = None,
    labels_file: LabelsFile = None,
    bundle: BundlePath = None,
    images: Annotated[int | None, typer.Option(min=1, help="Number of images, drawn at random; default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random sample.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the figures, and the matrix of projection scores, to this file."),
    ] = None,
    skip_broken_shards: SkipBroken = False,
) -> None:
    """Predict images with CLIP's MLPs replaced by the bundle's features, to see how well the features do."""
    from vitrine.models.files.writing import prepare_file, write_text
    from vitrine.models.inputs.opening import open_inputs
    from vitrine.models.progress import track
    from vitrine.service.engine.engine import Engine
    from vitrine.service.offline.replay import print_replay
    from vitrine.service.offline.replay import replay as run
    from vitrine.service.operations.settings import load_settings

    named, settings, console = chosen_labels(labels, labels_file), load_settings(), new_console()
    if json_file is not None:
        prepare_file(json_file)
    engine = Engine(open_bundle_or_default(bundle), settings.model_copy(update={"replacement": True}))
    result = run(
        engine,
        open_inputs(inputs, column, skip_broken_shards),
        settings.image_limits,
        settings.decode_seconds,
        images,
        seed,
        lambda batches: track(batches, "replay", len(batches), console, "batches"),
        named,
    )
    if json_file is not None:
        write_text(json_file, result.model_dump_json(indent=2) + "\n")
    print_replay(result, console)
