"""`vitrine verify`: whether a bundle is sound."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrine.commands.common import new_console, print_bundle


def verify(bundle: Annotated[Path, typer.Argument(help="Bundle directory.")]) -> None:
    """Check a bundle: every file's sha256, that its graphs run, and that the account adds up."""
    from vitrine.service.offline.verify import verify as run

    opened, console = run(bundle), new_console()
    print_bundle(opened, console)
    console.print("[green]all files as the manifest says; the graphs run and their rows add up")
