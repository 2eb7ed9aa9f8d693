"""`vitrine cards`: cards of what each feature of a CLT, or of residual SAEs, fires on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vitrine.commands.common import DataRoot, load_clip_of, new_console, print_bundle


def cards(
    checkpoint: Annotated[
        Path,
        typer.Option(help="A run's folder (its newest checkpoint) or one checkpoint, of a CLT or of residual SAEs."),
    ],
    bundle: Annotated[
        Path, typer.Option(help="The bundle that was exported from it. Cards of its other features are kept.")
    ],
    out: Annotated[
        Path, typer.Option(help="The bundle to write, with cards. Run it again to resume an interrupted call.")
    ],
    data_root: DataRoot = Path("data"),
    images: Annotated[int, typer.Option(min=2, help="Number of train images that exemplars are chosen from.")] = 15_000,
    held_out: Annotated[
        int, typer.Option(min=4, help="Number of val images: half calibrate the labels, half check them.")
    ] = 5_000,
    vocabulary: Annotated[
        list[str] | None,
        typer.Option(
            help="labels, imagenet, colours, textures, or a file with one word per line (repeatable); default: all."
        ),
    ] = None,
    pictures: Annotated[
        str,
        typer.Option(help="thumbnails of the images (check their licence), means of a feature's exemplars, or none."),
    ] = "thumbnails",
    references: Annotated[
        int, typer.Option(min=0, help="Number of images among which /v1/similar searches, by a CLT's features.")
    ] = 2_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images per batch.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Number of processes that decode images.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the samples, and of the random sets that labels must beat.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is a GPU.")] = None,
) -> None:
    """Describe what every feature fires on: exemplars, statistics, and a label if val images confirm it."""
    from typing import get_args

    import torch

    from vitrine.models.bundle.bundle import open_bundle
    from vitrine.training.cards.build import Options, build_cards
    from vitrine.training.cards.pictures import Pictures
    from vitrine.training.checkpoint import latest, read_meta

    if pictures not in get_args(Pictures):
        raise typer.BadParameter(f"{pictures!r} is not one of {', '.join(get_args(Pictures))}", param_hint="--pictures")
    newest, console = latest(checkpoint), new_console()
    clip = load_clip_of(read_meta(newest).recipe, data_root)
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
    carded = build_cards(clip, newest, open_bundle(bundle), data_root, out, options, console)
    print_bundle(carded, console)
