"""The four kinds of sources that a recipe may use, each as a `Listing`: any image by its index.

Access by index makes it possible to resume a run exactly. For this reason WebDataset shards are read through an index
of their members, built once with `tarfile`, and not as a stream with the webdataset library: the state of a stream's
shuffling would have to be stored in checkpoints.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torchvision
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder, OxfordIIITPet

from vitrine.models.images.errors import ImageError
from vitrine.models.shards import expand_braces, members, read_at
from vitrine.training.data.images import DataError, Images, Listing
from vitrine.training.recipes.recipe import FolderSource, HuggingFaceSource, Source, TorchvisionSource, WebDatasetSource

_BY_FLAG = ({"train": True}, {"train": False})
# torchvision's classification data sets with class names: arguments for the train and the val split.
TORCHVISION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "CIFAR10": _BY_FLAG,
    "CIFAR100": _BY_FLAG,
    "FashionMNIST": _BY_FLAG,
    "KMNIST": _BY_FLAG,
    "MNIST": _BY_FLAG,
    "Country211": ({"split": "train"}, {"split": "valid"}),
    "DTD": ({"split": "train"}, {"split": "val"}),
    "FGVCAircraft": ({"split": "train"}, {"split": "val"}),
    "Flowers102": ({"split": "train"}, {"split": "val"}),
    "Food101": ({"split": "train"}, {"split": "test"}),
    "Imagenette": ({"split": "train"}, {"split": "val"}),
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
    "RenderedSST2": ({"split": "train"}, {"split": "val"}),
    "STL10": ({"split": "train"}, {"split": "test"}),
}
IMAGES = ("jpg", "jpeg", "png", "webp")  # in WebDataset shards


def open_images(
    source: Source, data_root: Path, transform: Callable[[Image.Image], Tensor], max_broken: float = 0.0
) -> Images:
    """Open the images of a source; its paths are relative to `data_root`.

    Args:
        transform: RGB image -> pixels [3, H, W].
        max_broken: share of unreadable images at which `Images` raises `DataError`; 0: at the first.

    Raises:
        DataError: no images, a failed download, an unknown name or column; the message lists what exists.
    """
    listing: Listing
    match source:
        case FolderSource():
            listing = _folder(data_root / source.path)
        case TorchvisionSource():
            listing = _torchvision(source, data_root)
        case HuggingFaceSource():
            listing = _HuggingFace(source, data_root)
        case WebDatasetSource():
            listing = _WebDataset(source, data_root)
    if not len(listing):
        raise DataError(f"no images in {listing.title}")
    return Images(listing, transform, max_broken)


class _Torchvision:
    """A torchvision data set without a transform."""

    def __init__(self, dataset: Any, title: str) -> None:
        self.dataset, self.title = dataset, title
        # Imagenette has several names per class.
        self.classes = tuple(name if isinstance(name, str) else name[0] for name in dataset.classes)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        is_folder = isinstance(self.dataset, ImageFolder)
        return self.dataset.samples[index][0] if is_folder else f"{self.title} row {index}"

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        if isinstance(self.dataset, OxfordIIITPet):  # it has files, and no option to read them otherwise
            return _read_file(self.dataset._images[index]), self.dataset._labels[index]
        image, class_index = self.dataset[index]
        return image, int(class_index)


def _read_file(path: str | Path) -> bytes:
    return Path(path).read_bytes()


def _folder(root: Path) -> _Torchvision:
    try:
        return _Torchvision(ImageFolder(str(root), loader=_read_file), str(root))
    except OSError as error:
        raise DataError(f"no images under {root}: {error}") from error


def _torchvision(source: TorchvisionSource, data_root: Path) -> _Torchvision:
    if source.name not in TORCHVISION:
        near = difflib.get_close_matches(source.name, TORCHVISION, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(TORCHVISION)}"
        raise DataError(f"{source.name} is none of torchvision's classification sets; {hint}")
    if (folder := data_root / source.name.lower() / source.split).is_dir():
        return _with_spaces(_folder(folder))  # the same images as class folders, without a download
    dataset = getattr(torchvision.datasets, source.name)
    options = TORCHVISION[source.name][source.split == "val"]
    if "loader" in inspect.signature(dataset).parameters:
        options = {**options, "loader": _read_file}  # the bytes, for our own decoder
    title = f"{source.name}[{source.split}]"
    try:
        return _with_spaces(_Torchvision(dataset(str(data_root), **options), title))
    except (OSError, RuntimeError):
        pass  # missing or incomplete
    try:
        return _with_spaces(_Torchvision(dataset(str(data_root), download=True, **options), title))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{title} is not in {data_root} and cannot be downloaded: {error}; "
            f"put there what torchvision would have put there, or class folders into {folder}"
        ) from error


def _with_spaces(listing: _Torchvision) -> _Torchvision:
    """Replace underscores in class names, as CLIP prompts need words: aquarium fish, not aquarium_fish."""
    listing.classes = tuple(name.replace("_", " ") for name in listing.classes)
    return listing


class _HuggingFace:
    """A data set read by `datasets.load_dataset`, from a folder or from the hub; images are decoded on access.

    The label column contains a class (named by its ClassLabel, or else by the sorted values), or objects with `bbox`
    and `category`: then the class is that of the largest box, and images without objects are left out.
    """

    def __init__(self, source: HuggingFaceSource, data_root: Path) -> None:
        import datasets  # not at the top: it imports pandas and pyarrow

        self.title, self.column = f"{source.id}[{source.split}]", source.image
        folder = data_root / source.id
        try:
            rows = datasets.load_dataset(str(folder) if folder.exists() else source.id, split=source.split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"{self.title} cannot be loaded, neither as the folder {folder} nor from the Hugging Face hub: {error}"
            ) from error
        for column in (source.image, source.label):
            if column not in rows.column_names:
                raise DataError(f"{self.title} has no column {column!r}; it has {', '.join(rows.column_names)}")
        if not isinstance(rows.features[source.image], datasets.Image):
            raise DataError(f"{self.title}: column {source.image!r} is no image but {rows.features[source.image]}")
        self.rows = rows.cast_column(source.image, datasets.Image(decode=False))

        feature = rows.features[source.label]
        values = rows.select_columns([source.label])[:][source.label]
        fields = getattr(feature, "feature", feature)  # objects are a dict of lists or a list of dicts
        if isinstance(fields, dict):
            if missing := {"bbox", "category"} - fields.keys():
                raise DataError(f"{self.title}: column {source.label!r} has no {' and no '.join(sorted(missing))}")
            values = _largest_objects(values)
            feature = getattr(fields["category"], "feature", fields["category"])
        self.numbers = [row for row, value in enumerate(values) if value is not None]
        labels = [value for value in values if value is not None]
        if isinstance(feature, datasets.ClassLabel):
            self.classes, self.class_indices = tuple(feature.names), labels
        else:
            self.classes, self.class_indices = _classes(labels)
        if labels and min(self.class_indices) < 0:  # the hub marks withheld labels of a test split this way
            raise DataError(f"{self.title}: column {source.label!r} has no classes (-1); choose another split")

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return f"{self.title} row {self.numbers[index]}"

    def read(self, index: int) -> tuple[bytes, int]:
        image = self.rows[self.numbers[index]][self.column] or {}
        if image.get("bytes") is not None:
            return image["bytes"], self.class_indices[index]
        if image.get("path") is None:
            raise ImageError("invalid_image", "the row has no image")
        return _read_file(image["path"]), self.class_indices[index]


def _largest_objects(rows: Sequence[Any]) -> list[Any]:
    """The category of the largest box of each row; None for a row without objects.

    Boxes are x, y, width, height (as in COCO) or x0, y0, x1, y1 (as in the hub's copy of COCO): corners are assumed if
    every box of the data set is valid as corners.
    """
    objects = []
    for row in rows:
        if isinstance(row, list):
            objects.append([(item["bbox"], item["category"]) for item in row])
        else:
            objects.append(list(zip(row["bbox"], row["category"], strict=True)) if row else [])
    corners = all(x1 >= x0 and y1 >= y0 for (x0, y0, x1, y1), _ in itertools.chain.from_iterable(objects))

    def area(item: tuple[Sequence[float], Any]) -> float:
        x, y, right, lower = item[0]
        return (right - x) * (lower - y) if corners else right * lower

    return [max(items, key=area)[1] if items else None for items in objects]


class _Sample(NamedTuple):
    shard: Path
    key: str
    offset: int
    size: int
    label: int | str  # index (.cls) or class name (.txt)


class _WebDataset:
    """Samples in tar shards; only their offsets are kept, so worker processes do not share open files."""

    def __init__(self, source: WebDatasetSource, data_root: Path) -> None:
        self.title = str(data_root / source.shards)
        self.samples: list[_Sample] = []
        for name in dict.fromkeys(expand_braces(source.shards)):
            shard = data_root / name
            try:
                self.samples += _samples(shard)
            except (OSError, tarfile.TarError) as error:
                raise DataError(f"{shard} is no readable tar file: {error}; make or fetch it again") from error
        labels = [sample.label for sample in self.samples]
        if len({type(label) for label in labels}) > 1:
            raise DataError(f"{self.title}: some samples have .cls and others only .txt; give all of them the same")
        class_names = _lines(data_root / source.classes) if source.classes else None
        if any(isinstance(label, str) for label in labels):
            self.classes, self.class_indices = _classes(labels, class_names)
        else:
            self.class_indices = [int(label) for label in labels]
            self.classes = class_names or tuple(
                str(number) for number in range(max(self.class_indices, default=-1) + 1)
            )
        for sample, class_index in zip(self.samples, self.class_indices, strict=True):
            if not 0 <= class_index < len(self.classes):
                raise DataError(
                    f"{sample.shard}: {sample.key} is of class {sample.label!r}, which is none of the "
                    f"{len(self.classes)} classes of {source.classes or self.title}"
                )

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return f"{self.samples[index].shard}: {self.samples[index].key}"

    def read(self, index: int) -> tuple[bytes, int]:
        sample = self.samples[index]
        return read_at(sample.shard, sample.offset, sample.size), self.class_indices[index]


def _samples(shard: Path) -> Iterator[_Sample]:
    """A sample is all files with the same path up to the first dot of the name; those without an image are skipped."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[tuple[str, str], str] = {}
    for member in members(shard):
        folder, slash, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        key, extension = f"{folder}{slash}{stem}", extension.lower()
        if extension in IMAGES:
            images[key] = member
        elif extension in ("cls", "txt"):
            content = read_at(shard, member.offset_data, member.size)
            labels[key, extension] = content.decode(errors="replace").strip()
    for key, member in images.items():
        index, name = labels.get((key, "cls")), labels.get((key, "txt"))
        if index is None and name is None:
            raise DataError(f"{shard}: {key} has neither .cls (an index) nor .txt (a class name)")
        if index is not None and not index.isdecimal():
            raise DataError(f"{shard}: {key}.cls holds {index[:40]!r}, not the index of a class")
        yield _Sample(shard, key, member.offset_data, member.size, int(index) if index is not None else name or "")


def _lines(file: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class names cannot be read from {file}: {error}") from error


def _classes(values: Sequence[Any], names: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], list[int]]:
    """(names, an index for each value); -1 for a value that is not among the given names."""
    distinct = names or sorted(set(values))
    index = {value: number for number, value in enumerate(distinct)}
    return tuple(map(str, distinct)), [index.get(value, -1) for value in values]
