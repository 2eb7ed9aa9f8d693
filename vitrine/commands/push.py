"""`vitrine push`: a bundle as a repository of the Hugging Face hub, as a folder or uploaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrine.commands import completing
from vitrine.commands.common import new_console


def push(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.", autocompletion=completing.bundles)],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write with the repository's files, for git or `hf upload`.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(help="Upload to hf-hub:org/name\\[@branch]; a private repository is created if there is none."),
    ] = None,
) -> None:
    """Check a bundle and write it as a repository of the hub, with a model card and .gitattributes; or upload it."""
    from vitrine.models.bundle.bundle import open_bundle
    from vitrine.models.hub.address import parse_address
    from vitrine.models.hub.push import upload, write_folder

    if out is None and to is None:
        raise typer.BadParameter("give --out (a folder), --to (the hub), or both")
    address = parse_address(to) if to is not None else None
    opened, console = open_bundle(bundle), new_console()
    if out is not None:
        write_folder(opened, out, address)
        console.print(f"{out}: {opened.digest}", soft_wrap=True, highlight=False, markup=False)
    if address is not None:
        commit = upload(opened, address)
        console.print(
            f"{address}: {opened.digest}, commit {commit}\nvitrine pull {address} --out bundles/pulled "
            f"--digest {opened.digest}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
