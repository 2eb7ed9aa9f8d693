"""What a shell offers when an option's value is completed (`vitrine --install-completion`). Names are read from folders
alone: nothing is opened, and whatever is no name falls back to the shell's own completion of files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import typer

import vitrine.models


def recipes(incomplete: str) -> list[str]:
    """Shipped recipes by name, and TOML files."""
    from vitrine.training.recipes.catalogue import shipped

    return [*_starting([path.stem for path in shipped()], incomplete), *_paths(incomplete, ".toml")]


def bundles(incomplete: str) -> list[str]:
    """Folders with a manifest, and those that may lead to one."""
    paths = _paths(incomplete)
    return [path for path in paths if (Path(path) / "manifest.json").is_file()] or paths


def edits(context: typer.Context, incomplete: str) -> list[str]:
    """Of the bundle that the command names."""
    return _starting(_json_in(context, "edits"), incomplete)


def label_sets(context: typer.Context, incomplete: str) -> list[str]:
    """Of the bundle that the command names; `default` is every bundle's."""
    return _starting(["default", *_json_in(context, "label_sets")], incomplete)


def _json_in(context: typer.Context, folder: str) -> list[str]:
    embedded = Path(vitrine.models.__path__[0]) / "demo"
    bundle = Path(context.params.get("bundle") or os.environ.get("VITRINE_BUNDLE") or embedded)
    return sorted(file.stem for file in (bundle / folder).glob("*.json"))


def _paths(incomplete: str, suffix: str | None = None) -> list[str]:
    """Folders, and files of this suffix, whose path begins so; folders end with a slash."""
    folder, _, name = incomplete.rpartition("/")
    base = f"{folder}/" if "/" in incomplete else ""
    try:
        found = sorted(Path(base or ".").iterdir())
    except OSError:  # no such folder: nothing to offer
        return []
    shown = [path for path in found if path.name.startswith(name) and not path.name.startswith(".")]
    return [f"{base}{path.name}{'/' * path.is_dir()}" for path in shown if path.is_dir() or path.suffix == suffix]


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
