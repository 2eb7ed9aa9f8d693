"""What a file is, by its name; where a name says nothing, by its first bytes."""

from __future__ import annotations

from enum import Enum
from typing import Final

from vitrine.models.images.formats import format_of

IMAGES: Final = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "avif", "heic", "heif"),
    )
)
TARS: Final = frozenset(("tar", "tgz", "tbz", "tbz2", "txz", "tzst"))
COMPRESSED_TARS: Final = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4", ".tar.z")
PARQUET: Final = frozenset(("parquet", "pq", "parq"))
# Written beside people's images by their systems: Windows, macOS, and the stores of Synology and QNAP.
SYSTEM: Final = frozenset(
    (
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *("icon\r", "__macosx", "lost+found"),
        *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
    )
)
HEAD = 16  # bytes by which `starts_like_an_image` decides


class Kind(Enum):
    """What a name says."""

    IMAGE = "image"
    LITTER = "litter"  # hidden, or written by a system for itself
    BARE = "bare"  # without an extension: the first bytes decide
    TAR = "tar"
    PARQUET = "parquet"
    OTHER = "other"


def is_litter(name: str) -> bool:
    """Whether a file or a folder (one part of a path) is hidden, or some system's own."""
    return name.startswith(".") or name.lower() in SYSTEM


def kind(name: str) -> Kind:
    """What a file is by its name, without its folder; cases do not matter.

    A last part of digits alone ("frame.0001"), or with other signs than letters and digits ("12.05 at night"), is no
    extension.
    """
    if is_litter(name):
        return Kind.LITTER
    _, _, last = name.rpartition(".")
    extension = last.lower()
    if extension in IMAGES and last != name:
        return Kind.IMAGE
    if last == name or not extension.isalnum() or extension.isdigit():
        return Kind.BARE
    if extension in TARS or name.lower().endswith(COMPRESSED_TARS):
        return Kind.TAR
    return Kind.PARQUET if extension in PARQUET else Kind.OTHER


def kind_of_path(path: str) -> Kind:
    """What a file in an archive is; it is litter, too, if one of its folders is."""
    folder, _, name = path.rpartition("/")
    if any(is_litter(part) for part in folder.split("/") if part not in (".", "..")):
        return Kind.LITTER
    return kind(name)


def starts_like_an_image(head: bytes) -> bool:
    """Whether a file whose first `HEAD` bytes are these may be an image."""
    found = format_of(head)
    return found is not None and (found != "BMP" or head[6:10] == bytes(4))  # many a text begins with "BM"
