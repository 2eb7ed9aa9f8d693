#!/usr/bin/env python3
"""The `vitrine` command: this file as a script on the PATH, or `python -m vitrine`.

A user's own project may well hold a `vitrine.py`, and PYTHONPATH or the working directory may lead to it. So before
anything of ours is imported, such places are taken off the path, of this process and of those that it starts: a
server's workers, Ray's, torch's. Everything else that PYTHONPATH names stays.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec


def import_our_own() -> None:
    """Make `import vitrine` mean the package that belongs to this file, here and in child processes."""
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    ours = _origin(sys.path, without=given) or _origin(sys.path)  # PYTHONPATH alone leads to a `pip install --target`
    sys.path[:] = [entry for entry in sys.path if _leads_to(entry) in (None, ours)]
    if given:
        os.environ["PYTHONPATH"] = os.pathsep.join(entry for entry in given if _leads_to(entry) in (None, ours))
    if _leads_to(os.getcwd()) not in (None, ours):
        os.environ["PYTHONSAFEPATH"] = "1"  # else `python -m` in a child process looks there first


def _origin(path: list[str], without: list[str] = ()) -> str | None:  # type: ignore[assignment]
    """The file of the package that `import vitrine` would take, or has taken, from these places."""
    before = sys.path[:]
    left_out = set(map(os.path.abspath, without))
    sys.path[:] = [entry for entry in path if os.path.abspath(entry) not in left_out]
    try:
        found = find_spec("vitrine")
    finally:
        sys.path[:] = before
    return found.origin if found else None


def _leads_to(entry: str) -> str | None:
    found = PathFinder.find_spec("vitrine", [entry])
    return found.origin if found else None


if __name__ == "__main__":
    import_our_own()

    from vitrine.commands import app

    app()
