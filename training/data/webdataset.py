"""WebDataset shards as a `Listing`: any sample by its number.

Through an index of the members, and not as a stream with the webdataset library: the state of a stream's shuffling
would have to be stored in checkpoints.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitrine.models.files.names import display, printable
from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.files import common_names
from vitrine.models.inputs.folder import walk
from vitrine.models.inputs.lists import read_names
from vitrine.models.inputs.names import Kind, kind
from vitrine.models.inputs.pattern import find
from vitrine.models.inputs.places import read_at
from vitrine.models.inputs.shards import broken
from vitrine.models.inputs.skipped import Reason, Skipped
from vitrine.models.inputs.streams import ShardError
from vitrine.models.inputs.webdataset import Sample, read_samples
from vitrine.training.data.images import DataError
from vitrine.training.recipes.image_sources import WebDatasetSource


class _Numbered(NamedTuple):
    shard: Path
    key: str
    offset: int
    size: int


class WebDataset:
    """Samples in tar shards; only their offsets are kept, so worker processes do not share open files.

    Classes are the numbers in .cls, or the names in .txt. Without `classes`, texts are taken for captions, which are
    no classes, if more than half of them differ from one another. Where some sample has no class, or there are
    captions, the images are read without classes: `unlabelled` says why.
    """

    def __init__(self, source: WebDatasetSource, data_root: Path) -> None:
        """Raises `DataError` for a shard that cannot be read, and for samples that do not fit `classes`."""
        self.title, self.skipped, self.unlabelled = display(data_root / source.shards), Skipped(), ""
        self.samples: list[_Numbered] = []
        found: list[tuple[Path, Sample]] = []
        shards = _shards(source.shards, data_root, self.skipped)
        for shard, title in zip(shards, common_names(shards), strict=True):
            try:
                found += [(shard, sample) for sample in read_samples(shard, title, self.skipped)]
            except ShardError as error:
                if not source.skip_broken:
                    raise DataError(str(broken(shard, error))) from error
                self.skipped.add(Reason.BROKEN, title, str(error))
        self.samples = [_Numbered(shard, sample.key, sample.offset, sample.size) for shard, sample in found]
        names = _names(data_root / source.classes) if source.classes else None
        self.classes, self.class_indices, self.unlabelled = _labels([sample for _, sample in found], names)
        if names is not None and (self.unlabelled or -1 in self.class_indices):
            raise DataError(self._misfit(found, source.classes, names))

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return display(f"{self.samples[index].shard}: {self.samples[index].key}")

    def read(self, index: int) -> tuple[bytes, int]:
        sample = self.samples[index]
        return read_at(sample.shard, sample.offset, sample.size), self.class_indices[index]

    def _misfit(self, found: list[tuple[Path, Sample]], classes: str | None, names: tuple[str, ...]) -> str:
        """The first sample that is of none of the classes that the recipe names."""
        if self.unlabelled:
            return f"{self.title} does not fit `classes`: {self.unlabelled}"
        number = self.class_indices.index(-1)
        shard, sample = found[number]
        value = repr(sample.text) if sample.number is None else sample.number
        return (
            f"{display(shard)}: {display(sample.key)} has class {value}, which is not one of the {len(names)} classes "
            f"of {classes}"
        )


def _shards(pattern: str, data_root: Path, skipped: Skipped) -> list[Path]:
    """The tars that a pattern stands for, or those in a folder. Raises `DataError`."""
    try:
        paths = find(pattern, skipped, data_root)
        if len(paths) == 1 and paths[0].is_dir():
            inside = walk(paths[0], skipped)
            for beside in (*inside.images, *inside.tables):
                skipped.add(Reason.BESIDE, beside)
            return [paths[0] / tar for tar in inside.tars]
    except InputError as error:
        raise DataError(str(error)) from error
    if not glob.has_magic(pattern):
        return paths
    shards = []
    for path in paths:
        if (what := kind(path.name)) in (Kind.TAR, Kind.BARE):
            shards.append(path)
        else:
            skipped.add(Reason.LITTER if what is Kind.LITTER else Reason.OTHER, str(path))
    return shards


def _labels(samples: Sequence[Sample], names: tuple[str, ...] | None) -> tuple[tuple[str, ...], list[int], str]:
    """(names of the classes, class of each sample, why there are no classes); -1: none of the given names."""
    without = [sample for sample in samples if sample.number is None and sample.text is None]
    texts = [sample.text for sample in samples if sample.number is None and sample.text is not None]
    odd = [sample for sample in samples if sample.number is not None and not sample.number.isdecimal()]
    if not samples:
        return (), [], ""
    if without:
        reason = _of(
            len(without), samples, f"neither .cls (an index) nor .txt (a class name), such as {without[0].key!r}"
        )
    elif texts and len(texts) < len(samples):
        reason = _of(len(texts), samples, "only .txt, while the others have .cls")
    elif odd:
        reason = _of(
            len(odd), samples, f"a .cls that is not the index of a class, such as {odd[0].key!r}: {odd[0].number!r:.40}"
        )
    elif texts and names is None and 2 * len(set(texts)) > len(texts):
        reason = f"its {len(texts):,} texts are captions, not classes: {len(set(texts)):,} of them differ"
    elif texts:
        classes, indices = number_classes(texts, names)
        return classes, indices, ""
    else:
        numbers = [int(sample.number or 0) for sample in samples]
        classes = names or tuple(str(number) for number in range(max(numbers) + 1))
        return classes, [number if number < len(classes) else -1 for number in numbers], ""
    return (), [0] * len(samples), printable(reason)


def _of(count: int, samples: Sequence[Sample], what: str) -> str:
    return f"{count:,} of {len(samples):,} samples have {what}"


def _names(file: Path) -> tuple[str, ...]:
    try:
        return tuple(read_names(file, "class names"))
    except InputError as error:
        raise DataError(str(error)) from error


def number_classes(values: Sequence[Any], names: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], list[int]]:
    """(names, an index for each value); -1 for a value that is not among the given names."""
    distinct = names or sorted(set(values))
    index = {value: number for number, value in enumerate(distinct)}
    return tuple(map(str, distinct)), [index.get(value, -1) for value in values]
