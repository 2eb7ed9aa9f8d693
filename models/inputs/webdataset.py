"""The members of a tar as WebDataset's samples: what has the same path up to the first dot of its name.

The rest is the extension: `a.jpg`, `a.input.jpg` and `a.cls` are the sample `a`. A name that comes again begins a new
sample of that key, as where one tar was appended to another.
"""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from vitrine.models.inputs.names import Kind, kind_of_path
from vitrine.models.inputs.places import read_at, resolve
from vitrine.models.inputs.skipped import Reason, Skipped
from vitrine.models.inputs.streams import ShardError, open_stream
from vitrine.models.inputs.tar import Member, Tar, Type

LONGEST_TEXT = 2**16  # bytes that are read of a class or a text
_Key = tuple[str, int]  # path up to the first dot, how often it came before


class Sample(NamedTuple):
    """One image and what stands beside it."""

    key: str
    offset: int
    size: int
    number: str | None  # what its .cls holds
    text: str | None  # what its .txt holds


def split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def read_samples(shard: Path, title: str, skipped: Skipped) -> list[Sample]:
    """The samples of a tar that have an image, by their first members.

    Of several images in a sample the one without a further extension is taken (jpg before input.jpg), else the first;
    the others are counted in `skipped`. title: the tar's name there. Raises `ShardError` if the tar is damaged, or
    compressed: it could be read in one order alone.
    """
    left_out = Skipped()
    images: dict[_Key, list[tuple[str, Member]]] = {}
    texts: dict[tuple[_Key, str], str] = {}  # (key, "cls" or "txt") -> content
    links: list[tuple[_Key, str, Member]] = []
    seen: Counter[tuple[str, str]] = Counter()
    with closing(open_stream(shard)) as stream:
        if stream.compressed:
            raise ShardError("it is compressed, and training reads images in any order", "Decompress it")
        tar = Tar(stream)
        for member in tar:
            name, extension = split_name(member.name)
            key = (name, seen[name, extension])
            if member.type is Type.FOLDER:
                continue
            what, last = kind_of_path(member.name), extension.rpartition(".")[2]
            if what is Kind.LITTER:
                left_out.add(Reason.LITTER, f"{title}/{member.name}")
                continue
            seen[name, extension] += 1
            if what is not Kind.IMAGE and last not in ("cls", "txt"):
                left_out.add(Reason.NO_SAMPLE, f"{title}/{member.name}")
            elif member.type in (Type.HARD_LINK, Type.SYMBOLIC_LINK):
                links.append((key, extension, member))
                images.setdefault(key, [])  # its place in the order
            elif member.type is not Type.FILE:
                sparse = member.type is Type.SPARSE
                left_out.add(Reason.SPARSE if sparse else Reason.SPECIAL, f"{title}/{member.name}")
            elif what is Kind.IMAGE:
                images.setdefault(key, []).append((extension, member))
            else:
                # The plain one counts, wherever it stands; else the first.
                if extension == last or (key, last) not in texts:
                    texts[key, last] = _text(stream.read(min(member.size, LONGEST_TEXT)))
    if links:
        targets = resolve(shard, [member for _, _, member in links])
        for (key, extension, member), (_, target) in zip(links, targets, strict=True):
            last = extension.rpartition(".")[2]
            if target is None:
                left_out.add(Reason.LINK, f"{title}/{member.name}", f"to {member.target}")
            elif last not in ("cls", "txt"):
                images[key].append((extension, target._replace(name=member.name)))
            elif extension == last or (key, last) not in texts:
                texts[key, last] = _text(read_at(shard, target.offset, min(target.size, LONGEST_TEXT)))
    samples = []
    for key, candidates in images.items():
        if not candidates:
            continue
        _, chosen = min(candidates, key=lambda candidate: "." in candidate[0])
        for _, other in candidates:
            if other is not chosen:
                left_out.add(Reason.EXTRA, f"{title}/{other.name}")
        samples.append(Sample(key[0], chosen.offset, chosen.size, texts.get((key, "cls")), texts.get((key, "txt"))))
    for key in {key for key, _ in texts} - images.keys():
        left_out.add(Reason.NO_PICTURE, f"{title}/{key[0]}")
    skipped.take(left_out)
    if not tar.ended:
        skipped.warnings.append(tar.no_end(title))
    return samples


def _text(content: bytes) -> str:
    return content.decode(errors="replace").strip()
