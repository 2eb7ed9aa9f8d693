"""`vitrine pull`: a bundle from the Hugging Face hub, verified."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrine.commands.common import new_console, print_bundle


def pull(
    address: Annotated[
        str, typer.Argument(help="hf-hub:org/name, or hf-hub:org/name@revision (a branch, tag, commit).")
    ],
    out: Annotated[Path, typer.Option(help="Bundle directory to write; it appears once it is complete and verified.")],
    digest: Annotated[
        str | None, typer.Option(help="Digest (sha256:…) that the bundle must have; default: any.")
    ] = None,
) -> None:
    """Download a bundle from the Hugging Face hub and check every file's sha256."""
    from vitrine.models.hub.address import parse_address
    from vitrine.models.hub.pull import pull as run

    console = new_console()
    bundle = run(parse_address(address), out, console, digest)
    print_bundle(bundle, console)
    asked = "" if digest is None else ", and the digest matches --digest"
    console.print(f"all files match the manifest{asked}", style="green")
    if digest is None:
        plain = f"to get exactly this bundle again: --digest {bundle.digest}"
        console.print(plain, soft_wrap=True, highlight=False)
