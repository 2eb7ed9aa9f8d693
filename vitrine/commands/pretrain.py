"""`vitrine pretrain`: a small CLIP from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrine.commands.common import DataRoot, new_console


def pretrain(
    recipe: Annotated[Path, typer.Option(help="Recipe (TOML) of a CLIP, see training/recipes/clip/.")],
    out: Annotated[Path, typer.Option(help="Folder of the CLIP; a run found there is taken up.")],
    data_root: DataRoot = Path("data"),
) -> None:
    """Train a small CLIP from scratch, for the demo; resumes by itself."""
    from vitrine.training.pretraining.pretrain import PretrainRecipe
    from vitrine.training.pretraining.pretrain import pretrain as run
    from vitrine.training.recipes.reading import read_toml

    console = new_console()
    weights = run(read_toml(recipe, PretrainRecipe), data_root, out, console)
    console.print(f"CLIP: {weights}")
