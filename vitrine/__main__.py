#!/usr/bin/env python3
"""The `vitrine` command: this file as a script on the PATH, or `python -m vitrine`.

A user's own project may contain a `vitrine.py`, and PYTHONPATH or the working directory may lead to it. So before
anything of ours is imported, such entries are removed from the path, of this process and of those that it starts (the
workers of a server, of Ray, of torch). All other entries of PYTHONPATH stay.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec


def isolate_own_package() -> None:
    """Make `import vitrine` mean the package that belongs to this file, here and in child processes."""
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    # A `pip install --target` is found by PYTHONPATH only.
    ours = _package_origin(sys.path, excluded=entries) or _package_origin(sys.path)
    sys.path[:] = [entry for entry in sys.path if _package_at(entry) in (None, ours)]
    if entries:
        os.environ["PYTHONPATH"] = os.pathsep.join(entry for entry in entries if _package_at(entry) in (None, ours))
    if _package_at(os.getcwd()) not in (None, ours):
        os.environ["PYTHONSAFEPATH"] = "1"  # else `python -m` in a child process looks there first


def _package_origin(path: list[str], excluded: list[str] = ()) -> str | None:  # type: ignore[assignment]
    """The file of the package that `import vitrine` would load, or has loaded, from these entries."""
    saved = sys.path[:]
    excluded_paths = set(map(os.path.abspath, excluded))
    sys.path[:] = [entry for entry in path if os.path.abspath(entry) not in excluded_paths]
    try:
        spec = find_spec("vitrine")
    finally:
        sys.path[:] = saved
    return spec.origin if spec else None


def _package_at(entry: str) -> str | None:
    spec = PathFinder.find_spec("vitrine", [entry])
    return spec.origin if spec else None


if __name__ == "__main__":
    isolate_own_package()

    from vitrine.commands import main

    main()
