"""Writes photos of two classes, some with a cue: class folders and Waterbirds' table.

    DIR/metadata.csv            image,label,group,split,cue
        train/<class>/*.png     the cue goes with the first class
        val/, test/             to find a repair on, and to measure it on: four groups (class, cue) of one size

and, not in the table:

        twin/                   the photos of train; the cue is independent of the class
        calibration/            a few of val: a dictionary is measured on them, a bundle's average picture is theirs
        pairs/                  those of test, with the cue where test has none and without it where test has it

`group` is what a person who labels groups would write ("red frame", "plain"), `cue` (1, 0) what was drawn, for scoring.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import Field, PositiveInt
from torch import Tensor

from vitrine.models.files.problems import naming
from vitrine.models.files.writing import written
from vitrine.models.groups import Grouped
from vitrine.models.images.decode import TRUSTED, decode, from_pillow
from vitrine.models.images.errors import ImageError
from vitrine.training.data.images import DataError, Listing
from vitrine.training.data.sources import open_images
from vitrine.training.planted.cue import COLOUR_NAMES, Colour, Cue, Kind
from vitrine.training.recipes.image_sources import Section, Source

TABLE = "metadata.csv"
COLUMNS = ("image", "label", "group", "split", "cue")
PLAIN = "plain"
CALIBRATION = 32  # images of each class
Split = Literal["train", "twin", "val", "calibration", "test", "pairs"]


class PlantedData(Section):
    """Which photos, and how the cue is dealt out. What is not given is drawn by the seed."""

    seed: int = 0
    train: Source = Field(description="photos to train on")
    test: Source = Field(description="photos to find and to measure a repair on")
    kind: Kind = "mat"
    colour: Colour | None = Field(default=None, description="default: one of eight, chosen by the seed")
    classes: tuple[str, str] | None = Field(default=None, description="two classes; the cue goes with the first")
    correlation: float = Field(default=0.95, gt=0.5, le=1, description="share of the first class that has the cue")
    train_images: PositiveInt = Field(default=1000, description="number of images of each class")
    group_images: PositiveInt = Field(
        default=125, description="number of images of each class, with and without the cue, in val and in test"
    )


class Row(NamedTuple):
    """A line of the table."""

    image: str  # path below the folder
    label: str
    group: str
    split: str
    cue: bool


class Planted(NamedTuple):
    """What was drawn by the seed."""

    cue: Cue
    classes: tuple[str, str]  # the cue goes with the first


def plan(settings: PlantedData, classes: Sequence[str], alike: NDArray[np.floating]) -> Planted:
    """Cue and classes. Drawn are two of those whose names are the most alike to the CLIP, a third of all pairs: of two
    that it can tell apart at a glance it learns no cue.

    Args:
        alike: [classes, classes] cosines of their labels.

    Raises `DataError` if there are fewer than two classes, or not those that are named.
    """
    generator = _random(settings.seed, 0)
    if len(set(classes)) < 2:
        raise DataError(
            "a cue is planted between two classes, but the images have fewer; give a folder with one subfolder per "
            "class"
        )
    if settings.classes and (unknown := set(settings.classes) - set(classes)):
        raise DataError(f"no class {', '.join(sorted(unknown))}; the classes are {', '.join(classes)}")
    pairs = np.sort(alike[np.triu_indices(len(classes), 1)])
    least = pairs[-max(1, len(pairs) // 3)]
    first, second = generator.permutation(len(classes))[:2]
    while alike[first, second] < least:
        first, second = generator.permutation(len(classes))[:2]
    chosen = settings.classes or (classes[first], classes[second])
    colour = settings.colour or COLOUR_NAMES[generator.integers(len(COLOUR_NAMES))]
    return Planted(Cue(kind=settings.kind, colour=colour, text=chosen[0]), chosen)


def write_data(settings: PlantedData, planted: Planted, data_root: Path, size: tuple[int, int], out: Path) -> None:
    """Write the folder, the table last. Photos are cropped to `size` (height, width): no later crop shall lose a cue.

    Raises `DataError` if a class has too few photos.
    """
    train, test = (open_images(source, data_root, as_it_is).listing for source in (settings.train, settings.test))
    if train.classes != test.classes:
        raise DataError(f"{test.title} and {train.title} have different classes: {', '.join(test.classes)}")
    half = 2 * settings.group_images
    few = min(CALIBRATION, half)
    to_train = _photos(train, planted.classes, settings.train_images, size, _random(settings.seed, 1))
    to_test = _photos(test, planted.classes, 2 * half, size, _random(settings.seed, 2))
    rows: list[Row] = []
    for place, label in enumerate(planted.classes):

        def write(split: Split, photos: Sequence[Image.Image], with_cue: NDArray[np.bool_], label: str = label) -> None:
            rows.extend(_write(planted.cue, out, split, label, photos, with_cue))

        share = settings.correlation if place == 0 else 1 - settings.correlation
        write("train", to_train[label], _some(share, settings.train_images, _random(settings.seed, 3, place)))
        write("twin", to_train[label], _some(0.5, settings.train_images, _random(settings.seed, 4, place)))
        alternating = np.arange(half) % 2 == 0
        write("val", to_test[label][:half], alternating)
        write("calibration", to_test[label][:few], alternating[:few])
        write("test", to_test[label][half:], alternating)
        write("pairs", to_test[label][half:], ~alternating)
    with written(out / TABLE) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows((*row[:-1], int(row.cue)) for row in rows if row.split in ("train", "val", "test"))


def read_table(folder: Path, split: Split) -> list[Row]:
    """The lines of a split. Raises `DataError` if the table is not one of these."""
    with naming(folder / TABLE), (folder / TABLE).open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    if not lines or set(COLUMNS) - set(lines[0]):
        raise DataError(f"{folder / TABLE} needs the columns {', '.join(COLUMNS)}; `vitrine planted make` writes them")
    return [
        Row(line["image"], line["label"], line["group"], line["split"], line["cue"] == "1")
        for line in lines
        if line["split"] == split
    ]


def grouped(rows: Sequence[Row], classes: Sequence[str]) -> Grouped:
    """Lines of the table as labels, which are places in `classes`, and groups."""
    names = tuple(dict.fromkeys(row.group for row in rows))
    return Grouped(
        labels=np.array([classes.index(row.label) for row in rows]),
        groups=np.array([names.index(row.group) for row in rows]),
        label_names=tuple(classes),
        group_names=names,
    )


def _photos(
    listing: Listing, classes: Sequence[str], count: int, size: tuple[int, int], generator: np.random.Generator
) -> dict[str, list[Image.Image]]:
    """So many photos of each of these classes, drawn by the generator; those that cannot be read are left out."""
    found: dict[str, list[Image.Image]] = {label: [] for label in classes}
    for index in generator.permutation(len(listing)).tolist():
        with suppress(OSError, ImageError):
            image, class_index = listing.read(index)
            label = listing.classes[class_index]
            if len(found.get(label, [])) < count and label in found:
                picture = decode(image, TRUSTED) if isinstance(image, bytes) else from_pillow(image)
                found[label].append(ImageOps.fit(picture.image, size[::-1], Image.Resampling.BICUBIC))
    for label, photos in found.items():
        if len(photos) < count:
            raise DataError(f"{listing.title} has {len(photos)} readable images of {label}, but {count} are needed")
    return found


def _write(
    cue: Cue, out: Path, split: Split, label: str, photos: Sequence[Image.Image], with_cue: NDArray[np.bool_]
) -> Iterator[Row]:
    folder = out / split / label
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, (photo, drawn) in enumerate(zip(photos, with_cue.tolist(), strict=True)):
            path = folder / f"{number:05}.png"
            (cue.draw(photo) if drawn else photo).save(path)
            yield Row(path.relative_to(out).as_posix(), label, cue.name if drawn else PLAIN, split, drawn)


def _some(share: float, count: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """[count] which have the cue: the share, rounded, of them."""
    return generator.permutation(count) < round(share * count)


def _random(seed: int, *purpose: int) -> np.random.Generator:
    return np.random.default_rng((seed, *purpose))


def as_it_is(image: Image.Image) -> Tensor:
    """A transform for those who read the listing alone."""
    raise AssertionError(f"{image} was to be read from the listing")
