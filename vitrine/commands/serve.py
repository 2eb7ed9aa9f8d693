"""`vitrine serve`: a bundle over HTTP."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from vitrine.commands.common import BundlePath, new_console, open_bundle_or_default, print_bundle


def serve(
    bundle: BundlePath = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 3000,
) -> None:
    """Serve a bundle over HTTP with BentoML (settings: service/README.md)."""
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # BentoML reads it when it is imported
    from vitrine.service.answers.reload import read_keys
    from vitrine.service.engine.runtime import choose
    from vitrine.service.operations.settings import load_settings, write_paths_to_environment

    settings, opened = load_settings(), open_bundle_or_default(bundle)
    choose(opened, settings)  # checked here, not in a worker that the server would restart again and again
    read_keys(settings)
    # as it was given: a symbolic link is followed anew at every reload
    write_paths_to_environment(settings.model_copy(update={"bundle": bundle or settings.bundle}))
    from vitrine.service.processes.supervisor import serve as run

    print_bundle(opened, new_console())
    sys.stdout.flush()
    run(host, port)
