"""One folder of images a class, or a label: the layout of most sets of labelled images."""

from __future__ import annotations

import os

from vitrine.models.files.names import display
from vitrine.models.inputs.files import reason
from vitrine.models.inputs.names import is_litter
from vitrine.models.inputs.skipped import Reason, Skipped
from vitrine.models.inputs.source import Files


def by_class(files: Files) -> tuple[tuple[str, ...], Files]:
    """(names of the classes, sorted; the images in folders of classes) of a folder's images.

    The class of an image is the first folder of its path (`class_name`), however deep it lies. Images beside these
    folders, and folders without images, are counted in `skipped`. Without any such folder there are no classes, and
    all images stay.
    """
    folders = sorted({path.partition("/")[0] for path in files.paths if "/" in path})
    if not folders:
        return (), files
    skipped = Skipped()
    skipped.take(files.skipped)
    for path in files.paths:
        if "/" not in path:
            skipped.add(Reason.NO_LABEL, path)
    try:
        with os.scandir(files.root) as entries:
            empty = {entry.name for entry in entries if entry.is_dir() and not is_litter(entry.name)} - set(folders)
    except OSError as error:  # it could be listed a moment ago
        skipped.warnings.append(f"{display(files.root)} can no longer be read: {reason(error)}")
        empty = set()
    for name in sorted(empty):
        skipped.add(Reason.EMPTY, name)
    inside = Files(files.kind, files.root, [path for path in files.paths if "/" in path], skipped)
    return tuple(map(display, folders)), inside


def class_name(path: str) -> str:
    """The class of an image by its path below the folder of classes."""
    return display(path.partition("/")[0])
