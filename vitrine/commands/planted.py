"""`vitrine planted`: a CLIP with a spurious cue that is known, and how well a repair is aimed at it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrine.commands.common import DataRoot, errors_as_messages, load_clip_of, new_console

planted = typer.Typer(
    no_args_is_help=True, help="A CLIP with a planted cue, to measure repairs on: make it, score them."
)


def make(
    recipe: Annotated[Path, typer.Option(help="Recipe (TOML), see training/planted/.")],
    out: Annotated[Path, typer.Option(help="Folder to make; what is there already is kept.")],
    seed: Annotated[int | None, typer.Option(help="Instead of the recipe's: other classes, colour and photos.")] = None,
    data_root: DataRoot = Path("data"),
    twin: Annotated[bool, typer.Option(help="Also fine-tune the unplanted twin, the measure of repairs.")] = True,
) -> None:
    """Fine-tune a CLIP so that it takes a cue for a class; write its data, groups, dictionaries and bundle."""
    from vitrine.commands.export import export
    from vitrine.training.planted.make import make as run
    from vitrine.training.planted.make import measure_twin
    from vitrine.training.planted.recipe import PlantedRecipe
    from vitrine.training.recipes.reading import read_toml

    read, console = read_toml(recipe, PlantedRecipe), new_console()
    if seed is not None:
        read = read.model_copy(update={"data": read.data.model_copy(update={"seed": seed})})
    clip = load_clip_of(read, data_root)
    record = run(read, clip, data_root, out, console)
    if not (out / "bundle").exists():
        saes = out / "saes" if read.residual else None
        export(out / "bundle", checkpoint=out / "clt", residual=saes, data_root=out, calibration_images=64)
    if twin:
        record = measure_twin(read, clip, out, console)
    console.print(f"{record.cue.name} goes with {record.classes[0]}, against {record.classes[1]}", highlight=False)
    for name, accuracy in record.accuracy.items():
        groups = ", ".join(f"{group} {figure.value:.1%}" for group, figure in accuracy.groups.items())
        worst, average = accuracy.worst, accuracy.average
        console.print(
            f"{name}: worst group {worst.value:.1%} [{worst.low:.1%}, {worst.high:.1%}], average {average.value:.1%}; "
            f"{groups}",
            highlight=False,
            soft_wrap=True,
        )


planted.command(
    epilog="Example: vitrine planted make --recipe training/planted/planted-demo.toml --seed 1 --data-root data "
    "--out planted/seed-1"
)(errors_as_messages(make))
