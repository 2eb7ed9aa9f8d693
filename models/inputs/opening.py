"""What a command line names: a folder, images, a list, tars or Parquet files, as one numbered list."""

from __future__ import annotations

import os
from pathlib import Path

from vitrine.models.files.names import printable
from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.files import read_head, reason
from vitrine.models.inputs.folder import walk
from vitrine.models.inputs.lists import read_list
from vitrine.models.inputs.names import HEAD, Kind, kind, starts_like_an_image
from vitrine.models.inputs.parquet import ParquetFiles
from vitrine.models.inputs.pattern import find
from vitrine.models.inputs.shards import Shards
from vitrine.models.inputs.skipped import Reason, Skipped
from vitrine.models.inputs.source import Files, Source
from vitrine.models.inputs.streams import COMPRESSIONS, REFUSED


def open_inputs(inputs: str, column: str | None = None, skip_broken: bool = False) -> Source:
    """The source that a command line names.

    Args:
        inputs: a folder, of images, or else of tars or of Parquet files, at any depth; a text file with one path per
            line, relative to it; an image, a tar or a Parquet file; or a pattern of several of one of these kinds,
            with braces and globs (`models.inputs.pattern`).
        column: column of Parquet files with image bytes, or with paths relative to the file. Default: `image`, or the
            only one that holds bytes.
        skip_broken: tars and Parquet files that are damaged or missing are named in `skipped`, and are no error.

    Raises:
        InputError: the inputs do not exist, have no images, are of several kinds, or cannot be read.
    """
    skipped = Skipped()
    # absolute, as Ray's processes have another working directory
    paths = [path.absolute() for path in find(inputs, skipped)]
    shown = printable(inputs)
    source: Source
    if len(paths) == 1 and paths[0].is_dir():
        source = _folder(paths[0], column, skipped, skip_broken)
    else:
        kinds = {path: _kind(path) for path in paths}
        if any(what is Kind.PARQUET for what in kinds.values()):
            source = ParquetFiles(_all_of(Kind.PARQUET, kinds, shown, skipped), column, skipped, skip_broken)
        elif any(what is Kind.TAR for what in kinds.values()):
            source = Shards(_all_of(Kind.TAR, kinds, shown, skipped), skipped, skip_broken)
        elif missing := [path for path in paths if not os.path.lexists(path)]:
            stands = f"; {shown} matches {len(paths):,} files" if len(paths) > 1 else ""
            raise InputError(
                f"{printable(missing[0])} does not exist{stands}; give a folder, a list, or image, tar or Parquet files"
            )
        elif len(paths) == 1 and kinds[paths[0]] is not Kind.IMAGE:
            source = Files("list", paths[0].parent, read_list(paths[0]), skipped)
        else:
            source = Files("files", Path.cwd(), _images(kinds, skipped), skipped)
    if column is not None and not isinstance(source, ParquetFiles):
        raise InputError(f"--column can only be used with Parquet files, and {shown} is not one")
    if not len(source):
        raise InputError(". ".join([f"{shown} has no images", *skipped.lines()]))
    return source


def _folder(root: Path, column: str | None, skipped: Skipped, skip_broken: bool) -> Source:
    """Its images; if there are none, its tars or its Parquet files."""
    found = walk(root, skipped)
    if found.images or not (found.tars or found.tables):
        for path in (*found.tars, *found.tables):
            skipped.add(Reason.BESIDE, path)
        return Files("folder", root, found.images, skipped)
    if found.tars and found.tables:
        raise InputError(
            f"{printable(root)} has no images but both tar and Parquet files, {printable(found.tars[0])} and "
            f"{printable(found.tables[0])}; choose one kind: '{printable(root)}/**/*.tar'"
        )
    if found.tars:
        return Shards([root / path for path in found.tars], skipped, skip_broken)
    return ParquetFiles([root / path for path in found.tables], column, skipped, skip_broken)


def _all_of(what: Kind, kinds: dict[Path, Kind], shown: str, skipped: Skipped) -> list[Path]:
    """The paths of one kind. Raises `InputError` if some are of another kind that is read."""
    chosen = [path for path, found in kinds.items() if found is what]
    for path, found in kinds.items():
        if found in (Kind.LITTER, Kind.OTHER):
            skipped.add(Reason.LITTER if found is Kind.LITTER else Reason.OTHER, str(path))
        elif found is not what:
            raise InputError(
                f"{shown} matches files of several kinds, {printable(chosen[0])} and {printable(path)}; give files of "
                f"one kind"
            )
    return chosen


def _images(kinds: dict[Path, Kind], skipped: Skipped) -> list[str]:
    """Images by path, those of folders among them."""
    images = []
    for path, what in kinds.items():
        if path.is_dir() and what is not Kind.LITTER:
            found = walk(path, skipped)
            images += [str(path / name) for name in found.images]
            for name in (*found.tars, *found.tables):
                skipped.add(Reason.BESIDE, str(path / name))
        elif what is Kind.IMAGE:
            images.append(str(path))
        else:
            skipped.add(Reason.LITTER if what is Kind.LITTER else Reason.OTHER, str(path))
    here = f"{Path.cwd()}{os.sep}"
    return [path.removeprefix(here) for path in images]


def _kind(path: Path) -> Kind:
    """What is read as what: by its name if that says it, else by its first bytes."""
    what = kind(path.name)
    if path.is_dir():
        return what if what is Kind.LITTER else Kind.IMAGE
    if what not in (Kind.BARE, Kind.OTHER, Kind.LITTER):
        return what
    try:
        head = read_head(path, 512)
    except FileNotFoundError:
        return what
    except OSError as error:
        raise InputError(f"{printable(path)} cannot be read: {reason(error)}") from error
    if starts_like_an_image(head[:HEAD]):
        return Kind.IMAGE
    if head.startswith(b"PAR1"):
        return Kind.PARQUET
    if head[257:262] == b"ustar" or head.startswith((*COMPRESSIONS, *REFUSED)):
        return Kind.TAR
    return what
