"""`vitrine recipes`: the recipes that come with Vitrine, and what it would cost to train them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrine.commands import completing
from vitrine.commands.common import DataRoot, new_console


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Show one recipe in detail: the name of a shipped recipe, or a TOML file.",
            autocompletion=completing.recipes,
        ),
    ] = None,
    data_root: DataRoot = Path("data"),
    share: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of a GPU's peak speed that a run is assumed to reach.")
    ] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the recipes that come with Vitrine, with estimated parameters, memory, FLOPs, and hours on common GPUs."""
    import json

    from vitrine.training.recipes.catalogue import describe, find_recipe, print_list, print_one, shipped

    path = find_recipe(name) if name else None
    if as_json:
        costs = describe(path, data_root, share) if path else [describe(file, data_root, share) for file in shipped()]
        typer.echo(json.dumps(costs, indent=2))
    elif path:
        print_one(path, data_root, share, new_console())
    else:
        print_list(data_root, share, new_console())
