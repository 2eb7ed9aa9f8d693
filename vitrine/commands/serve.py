"""`vitrine serve`: a bundle over HTTP."""

from __future__ import annotations

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
    from vitrine.models.bundle.label_sets import read_label_sets
    from vitrine.service.answers.reload import read_keys
    from vitrine.service.engine.runtime import choose
    from vitrine.service.operations.settings import load_settings, write_paths_to_environment

    settings, opened = load_settings(), open_bundle_or_default(bundle)
    choose(opened, settings)  # what is quickly checked is refused before a server is started
    read_keys(settings)
    if settings.label_sets:
        read_label_sets(settings.label_sets)
    # The path as it was given: a reload follows a link again.
    write_paths_to_environment(settings.model_copy(update={"bundle": bundle or settings.bundle}))
    from vitrine.service.processes.home import bentoml_home

    print_bundle(opened, new_console())
    sys.stdout.flush()
    with bentoml_home():  # before BentoML is imported
        from vitrine.service.processes.supervisor import serve as run

        run(host, port, settings.shutdown_seconds)
