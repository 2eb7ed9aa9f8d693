"""`vitrine pretrain`: a small CLIP from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrine.commands.common import DataRoot, Seed, Settings, chosen_settings, new_console


def pretrain(
    recipe: Annotated[Path, typer.Option(help="Recipe (TOML) of a CLIP; see training/recipes/clip/.")],
    out: Annotated[Path, typer.Option(help="Folder for the CLIP; a run found there is resumed.")],
    data_root: DataRoot = Path("data"),
    settings: Settings = None,
    seed: Seed = None,
) -> None:
    """Train a small CLIP from scratch, for the demo; an interrupted run is resumed."""
    from vitrine.training.pretraining.recipe import PretrainRecipe
    from vitrine.training.recipes.reading import read_toml

    loaded, console = read_toml(recipe, PretrainRecipe, chosen_settings(settings, seed)), new_console()
    from vitrine.training.pretraining.pretrain import pretrain as run  # torch, after the recipe was found to be good

    weights = run(loaded, data_root, out, console)
    console.print(f"CLIP: {weights}")
