"""`vitrine train`: a CLT, or residual SAEs, on a CLIP's activations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrine.commands import completing
from vitrine.commands.common import (
    DataRoot,
    Seed,
    Settings,
    SkipBroken,
    chosen_settings,
    load_clip_of,
    new_console,
)
from vitrine.models.stopping import advising


def train(
    recipe: Annotated[
        str,
        typer.Option(help="Name of a recipe (see vitrine recipes), or its file.", autocompletion=completing.recipes),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; a run found there is resumed.")],
    data_root: DataRoot = Path("data"),
    settings: Settings = None,
    seed: Seed = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many steps, and write a checkpoint.")
    ] = None,
    devices: Annotated[
        int,
        typer.Option(
            min=1, help="Number of GPUs (or CPU processes). On several machines, start this command with torchrun."
        ),
    ] = 1,
    shard: Annotated[
        bool, typer.Option(help="Shard the weights across the devices, for dictionaries too large for one.")
    ] = False,
    accelerator: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    skip_broken_shards: SkipBroken = False,
    wandb: Annotated[str | None, typer.Option(help="Also log to this Weights & Biases project.")] = None,
) -> None:
    """Train a CLT, or residual SAEs, on a CLIP's activations; an interrupted run is resumed.

    To see curves: tensorboard --logdir OUT."""
    from vitrine.training.recipes.catalogue import find_recipe
    from vitrine.training.recipes.reading import load_recipe
    from vitrine.training.recipes.reading import skip_broken_shards as skipping

    loaded, console = load_recipe(find_recipe(recipe), chosen_settings(settings, seed)), new_console()
    if skip_broken_shards:
        loaded = skipping(loaded)
    from vitrine.training.run.parallel import make_fabric, one_report  # torch, after the recipe was found to be good
    from vitrine.training.run.run import train as run

    fabric = make_fabric(devices, shard, loaded.training.precision, accelerator)
    fabric.launch()
    with (
        one_report(fabric),
        advising("run the same command again to continue from the last checkpoint, if there is one"),
    ):
        checkpoint = run(
            loaded,
            load_clip_of(loaded, data_root),
            data_root,
            out,
            console,
            fabric,
            max_steps=max_steps,
            wandb_project=wandb,
        )
    if fabric.is_global_zero:
        console.print(f"checkpoint: {checkpoint}")
