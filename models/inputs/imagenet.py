"""ImageNet's classes by their WordNet ids: the names of the folders that ImageNet comes in, n01440764/ and so on.

imagenet.tsv has the 1,000 ids of ILSVRC 2012 in their order, each with open_clip's name for it
(`open_clip.zero_shot_metadata.IMAGENET_CLASSNAMES`; the ids: timm's imagenet_synsets.txt). It is a file of our own
because the service has neither package. Two names are there twice, for classes that differ by nothing one could see:
missile (n03773504, n04008634) and sunglasses (n04355933, n04356056).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

_ID = re.compile(r"n\d{8}")


def class_label(name: str) -> str:
    """ImageNet's name of a class for its WordNet id; any other name, and an id of no such class, as it is."""
    return _names().get(name, name) if _ID.fullmatch(name) else name


def class_labels() -> tuple[str, ...]:
    """ImageNet's classes, by names that differ from one another: 998."""
    return tuple(dict.fromkeys(_names().values()))


def unknown_ids(names: Iterable[str]) -> list[str]:
    """The WordNet ids among `names` that are of none of the 1,000 classes (ImageNet-21k has 20,000 more)."""
    return [name for name in names if _ID.fullmatch(name) and name not in _names()]


@cache
def _names() -> dict[str, str]:
    lines = Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)
