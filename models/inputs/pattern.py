"""Names that stand for several files: braces and globs."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vitrine.models.inputs.folder import files
from vitrine.models.inputs.skipped import Skipped


def expand_braces(pattern: str) -> list[str]:
    """Expand braces as a shell does: "{000..002}" (leading zeros kept) and "{a,b}"; any number, not nested."""
    parts = []
    for index, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        if index % 2 == 0:  # outside braces
            parts.append([part])
        elif numbers := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = numbers.groups()
            step = 1 if int(first) <= int(last) else -1
            parts.append([f"{number:0{len(first)}}" for number in range(int(first), int(last) + step, step)])
        else:
            parts.append(part.split(","))
    return ["".join(choice) for choice in itertools.product(*parts)]


def find(pattern: str, skipped: Skipped, root: Path = Path()) -> list[Path]:
    """What a pattern stands for, each once; relative to `root` unless it is absolute.

    A path that exists is meant literally, whatever signs it has. Else braces are expanded, in their order, and globs
    (`*`, `?`, `[..]`, `**` for folders at any depth) replaced by what they match, sorted. What matches nothing stays
    as it is: no file.
    """
    if os.path.lexists(root / pattern):
        return [root / pattern]
    paths: list[str] = []
    for name in expand_braces(pattern):
        full = str(root / name)
        paths += [full] if os.path.lexists(full) else _matches(name, root, skipped) or [full]
    return [Path(path) for path in dict.fromkeys(paths)]


def _matches(pattern: str, root: Path, skipped: Skipped) -> list[str]:
    if not glob.has_magic(pattern):
        return []
    parts = Path(pattern).parts
    if "**" not in parts:
        return sorted(str(root / name) for name in glob.glob(pattern, root_dir=root))
    # The library's `**` has no guard against loops of links.
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    base, rest = root.joinpath(*parts[:first]), parts[first:]
    if not base.is_dir():
        return []
    return sorted(str(base / path) for path, _ in files(base, skipped) if _fits(path.split("/"), rest))


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a pattern, where "**" stands for any number of parts."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return _fits(path, pattern[1:]) or (bool(path) and not path[0].startswith(".") and _fits(path[1:], pattern))
    if not path or (path[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])
