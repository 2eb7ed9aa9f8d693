"""Reads every image file in some folders with `vitrine.models.images` and with open_clip, and lists the differences.

    python loadtests/image_corpus.py FOLDER ...

Meant for collections of unusual images: the tests in Pillow's source archive (Tests/images; `pip download --no-binary
pillow pillow==12.0.0`), Debian's libjxl-testdata (with PNG's own test suite). Each difference must have one of the
reasons of models/images/decode.py's table; the exit code is 1 if one has none. Set a memory limit (`ulimit -v`).
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from vitrine.models.images.decode import TRUSTED, Picture, decode
from vitrine.models.images.errors import DAMAGED_IMAGE_ERRORS, ImageError
from vitrine.models.images.formats import format_of

UNEXPLAINED = "DIFFERENT FOR AN UNKNOWN REASON"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    files = [path for folder in parser.parse_args().folders for path in sorted(folder.rglob("*")) if path.is_file()]
    warnings.simplefilter("ignore")
    outcomes: dict[str, list[str]] = defaultdict(list)
    for path in files:
        data = path.read_bytes()
        if format_of(data) is not None:
            outcomes[compare(data)].append(path.name)
    for outcome, names in sorted(outcomes.items(), key=lambda item: -len(item[1])):
        print(f"{len(names):5} {outcome}: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}")
    print(f"{sum(map(len, outcomes.values())):5} files of supported formats, of {len(files)} in total")
    return int(UNEXPLAINED in outcomes)


def compare(data: bytes) -> str:
    """What became of a file, in words."""
    usual, mode, orientation = _usual(data)
    try:
        ours = decode(data, TRUSTED)
    except ImageError as error:
        return f"refused by both ({error.code})" if usual is None else f"refused only here: {error}"
    if usual is None:
        return f"read only here{_notes(ours)}"
    if usual.shape == np.asarray(ours.image).shape and np.array_equal(usual, np.asarray(ours.image)):
        return "the same pixels"
    if ours.notes:
        return f"different{_notes(ours)}"
    if orientation != 1:
        return "different: turned upright"
    if mode.startswith("I"):
        return "different: 16 bits per channel"
    return UNEXPLAINED


def _usual(data: bytes) -> tuple[np.ndarray | None, str, int]:
    """(pixels as open_clip reads them, or None; mode; orientation)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
            if image.width * image.height > TRUSTED.pixels:
                return None, "", 1
            pixels = np.asarray(image.convert("RGB"))
            try:
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            except DAMAGED_IMAGE_ERRORS:
                orientation = 1
            return pixels, mode, orientation
    except DAMAGED_IMAGE_ERRORS:
        return None, "", 1


def _notes(picture: Picture) -> str:
    return "".join(f": {note.code}" for note in picture.notes)


if __name__ == "__main__":
    sys.exit(main())
