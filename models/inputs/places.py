"""The images in tars: an index of places, in the order of their data, with links resolved."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from vitrine.models.inputs.errors import Unreadable
from vitrine.models.inputs.files import LARGEST, open_regular, too_large
from vitrine.models.inputs.names import HEAD, Kind, kind_of_path, starts_like_an_image
from vitrine.models.inputs.skipped import Reason, Skipped
from vitrine.models.inputs.streams import open_stream
from vitrine.models.inputs.tar import Member, Tar, Type

MOST_LINKS = 40  # one after the other, as the system follows them


class Place(NamedTuple):
    """A member's data in a tar: of the file itself, or of what it is when decompressed."""

    name: str
    offset: int
    size: int


def list_images(shard: Path, title: str, skipped: Skipped) -> tuple[list[Place], bool]:
    """(the images of a tar by the order of their data, whether it is compressed).

    A link is an image beside the one that it leads to, and follows it. title: the tar's name in what is skipped.
    Raises `ShardError`.
    """
    left_out = Skipped()  # of a tar that proves to be damaged nothing is counted but itself
    files: list[Member] = []
    links: list[Member] = []
    with closing(open_stream(shard)) as stream:
        tar = Tar(stream)
        for member in tar:
            name = f"{title}/{member.name}"
            what = kind_of_path(member.name)
            if member.type is Type.FOLDER:
                continue
            if what is Kind.LITTER:
                left_out.add(Reason.LITTER, name)
            elif what not in (Kind.IMAGE, Kind.BARE):
                left_out.add(Reason.OTHER, name)
            elif member.type in (Type.HARD_LINK, Type.SYMBOLIC_LINK):
                links.append(member)
            elif member.type is Type.SPARSE:
                left_out.add(Reason.SPARSE, name)
            elif member.type is not Type.FILE:
                left_out.add(Reason.SPECIAL, name)
            elif what is Kind.BARE and not starts_like_an_image(stream.read(min(HEAD, member.size))):
                left_out.add(Reason.NO_IMAGE, name)
            else:
                files.append(member)
        compressed = stream.compressed
    places = [(member.offset, -1, Place(member.name, member.offset, member.size)) for member in files]
    if links:
        offsets = {member.offset for member in files}
        for link, target in resolve(shard, links):
            if target is None or (target.offset not in offsets and kind_of_path(link.name) is Kind.BARE):
                left_out.add(Reason.LINK, f"{title}/{link.name}", f"to {link.target}")
            else:
                places.append((target.offset, link.header, Place(link.name, target.offset, target.size)))
    skipped.take(left_out)
    if not tar.ended:
        skipped.warnings.append(tar.no_end(title))
    return [place for _, _, place in sorted(places)], compressed


def resolve(shard: Path, links: Iterable[Member]) -> list[tuple[Member, Member | None]]:
    """For each link of a tar the file that it leads to, or None: nowhere, out of the tar, or in a circle.

    Reads through the tar again, as a link may come before its target. Raises `ShardError`.
    """
    by_name: dict[str, list[Member]] = defaultdict(list)
    with closing(open_stream(shard)) as stream:
        for member in Tar(stream):
            by_name[posixpath.normpath(member.name)].append(member)
    return [(link, _target(link, by_name)) for link in links]


def _target(link: Member, by_name: dict[str, list[Member]]) -> Member | None:
    member = link
    for _ in range(MOST_LINKS):
        if member.type is Type.HARD_LINK:
            path = posixpath.normpath(member.target)
        elif member.type is Type.SYMBOLIC_LINK:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.target))
        else:
            return member if member.type is Type.FILE else None
        found = _find(path, link.header, by_name)
        if found is None:
            return None
        member = found
    return None


def _find(path: str, before: int, by_name: dict[str, list[Member]]) -> Member | None:
    """The last member of that name before some byte, else the first behind it; through links to folders."""
    for _ in range(MOST_LINKS):
        if named := by_name.get(path):
            earlier = [member for member in named if member.header < before]
            return earlier[-1] if earlier else named[0]
        parts = path.split("/")
        for length in range(1, len(parts)):
            folder = by_name.get("/".join(parts[:length]))
            if folder and folder[-1].type is Type.SYMBOLIC_LINK:
                target = posixpath.join("/".join(parts[: length - 1]), folder[-1].target)
                path = posixpath.normpath("/".join([target, *parts[length:]]))
                break
        else:
            return None
    return None


def read_at(shard: Path, offset: int, size: int) -> bytes:
    """The bytes of a member of a tar that is not compressed. Raises OSError."""
    if size > LARGEST:
        raise too_large(size)
    with open_regular(shard) as file:
        pieces = b""
        while len(pieces) < size:
            piece = os.pread(file.fileno(), size - len(pieces), offset + len(pieces))
            if not piece:
                raise Unreadable(f"{shard.name} ends inside it: the file has changed since it was listed")
            pieces += piece
    return pieces
