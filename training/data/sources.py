"""The four kinds of sources that a recipe may use, each as a `Listing`: any image by its index.

Access by index makes it possible to resume a run exactly. Class folders and shards have files of their own
(`training.data.folders`, `training.data.webdataset`).
"""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torchvision
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder, OxfordIIITPet

from vitrine.models.files.names import display
from vitrine.models.images.errors import ImageError
from vitrine.models.inputs.files import read_file
from vitrine.models.inputs.skipped import Reason, Skipped
from vitrine.training.data.classes import class_names
from vitrine.training.data.folders import ClassFolders
from vitrine.training.data.images import DataError, Images, Listing
from vitrine.training.data.webdataset import WebDataset, number_classes
from vitrine.training.recipes.image_sources import (
    FolderSource,
    HuggingFaceSource,
    Source,
    TorchvisionSource,
    WebDatasetSource,
)

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


_Named = TypeVar("_Named", "_Torchvision", ClassFolders)


def open_images(
    source: Source,
    data_root: Path,
    transform: Callable[[Image.Image], Tensor],
    max_broken: float = 0.0,
    classes: Mapping[str, str] | None = None,
) -> Images:
    """Open the images of a source; its paths are relative to `data_root`.

    Args:
        transform: RGB image -> pixels [3, H, W].
        max_broken: share of unreadable images at which `Images` raises `DataError`; 0: at the first.
        classes: labels of classes that the source calls otherwise (`data.classes` of a recipe).

    Raises:
        DataError: no images, a failed download, an unknown name or column; the message lists what exists.
    """
    listing: Listing
    match source:
        case FolderSource():
            listing = ClassFolders(data_root / source.path, source.classes)
        case TorchvisionSource():
            listing = _torchvision(source, data_root)
        case HuggingFaceSource():
            listing = _HuggingFace(source, data_root)
        case WebDatasetSource():
            listing = WebDataset(source, data_root)
    if not len(listing):
        raise DataError(". ".join([f"no images in {listing.title}", *listing.skipped.lines()]))
    return Images(listing, transform, max_broken, class_names(listing.classes, classes))


class _Torchvision:
    """A torchvision data set without a transform."""

    def __init__(self, dataset: Any, title: str) -> None:
        self.dataset, self.title, self.skipped, self.unlabelled = dataset, title, Skipped(), ""
        # Imagenette has several names per class.
        self.classes = tuple(name if isinstance(name, str) else name[0] for name in dataset.classes)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        is_folder = isinstance(self.dataset, ImageFolder)
        return display(self.dataset.samples[index][0]) if is_folder else f"{self.title} row {index}"

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        if isinstance(self.dataset, OxfordIIITPet):  # it has files, and no option to read them otherwise
            return read_file(self.dataset._images[index]), self.dataset._labels[index]
        image, class_index = self.dataset[index]
        return image, int(class_index)


def _torchvision(source: TorchvisionSource, data_root: Path) -> _Torchvision | ClassFolders:
    if source.name not in TORCHVISION:
        near = difflib.get_close_matches(source.name, TORCHVISION, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known sets: {', '.join(TORCHVISION)}"
        raise DataError(f"{source.name} is not one of torchvision's classification sets; {hint}")
    if (folder := data_root / source.name.lower() / source.split).is_dir():
        return _with_spaces(ClassFolders(folder))  # the same images as class folders, without a download
    dataset = getattr(torchvision.datasets, source.name)
    options = TORCHVISION[source.name][source.split == "val"]
    if "loader" in inspect.signature(dataset).parameters:
        options = {**options, "loader": read_file}  # the bytes, for our own decoder
    title = f"{source.name}[{source.split}]"
    try:
        return _with_spaces(_Torchvision(dataset(str(data_root), **options), title))
    except (OSError, RuntimeError):
        pass  # missing or incomplete
    try:
        return _with_spaces(_Torchvision(dataset(str(data_root), download=True, **options), title))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{title} is not in {data_root} and cannot be downloaded: {error}; put torchvision's files there "
            f"yourself, or folders of classes into {folder}"
        ) from error


def _with_spaces(listing: _Named) -> _Named:
    """Replace underscores in class names, as CLIP prompts need words: aquarium fish, not aquarium_fish."""
    listing.classes = tuple(name.replace("_", " ") for name in listing.classes)
    return listing


def _split_of(saved: Any, source: HuggingFaceSource) -> Any:
    """The split of what `save_to_disk` wrote: one by name of several, or the only one."""
    splits = saved if isinstance(saved, dict) else {str(saved.split or source.split): saved}
    if source.split not in splits:
        raise DataError(f"{source.id} was saved without split {source.split!r}; it has {', '.join(splits)}")
    return splits[source.split]


class _HuggingFace:
    """A data set read by `datasets`, from the hub or a folder, of `save_to_disk`, too; images are decoded on access.

    The label column contains a class (named by its ClassLabel, or else by the sorted values), or objects with `bbox`
    and `category`: then the class is that of the largest box, and images without objects are left out. Without such a
    column, if the recipe names none, or where a test split's classes are withheld, the images have no classes.
    """

    def __init__(self, source: HuggingFaceSource, data_root: Path) -> None:
        import datasets  # not at the top: it imports pandas and pyarrow

        self.title, self.column = f"{source.id}[{source.split}]", source.image
        self.skipped, self.unlabelled = Skipped(), ""
        self.classes: tuple[str, ...]
        folder = data_root / source.id
        try:
            if is_saved := any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
                rows = datasets.load_from_disk(str(folder))
            else:
                rows = datasets.load_dataset(str(folder) if folder.exists() else source.id, split=source.split)
        except Exception as error:  # a damaged file makes code of theirs fail anywhere
            raise DataError(
                f"{self.title} can be loaded neither from the folder {folder} nor from the Hugging Face hub: {error}"
            ) from error
        if is_saved:
            rows = _split_of(rows, source)
        default = HuggingFaceSource.model_fields["label"].default
        for column in (source.image,) if source.label == default else (source.image, source.label):
            if column not in rows.column_names:
                raise DataError(f"{self.title} has no column {column!r}; it has {', '.join(rows.column_names)}")
        if not isinstance(rows.features[source.image], datasets.Image):
            raise DataError(f"{self.title}: column {source.image!r} is not an image but {rows.features[source.image]}")
        self.rows = rows.cast_column(source.image, datasets.Image(decode=False))
        self.numbers = list(range(len(rows)))
        self.classes, self.class_indices = (), [0] * len(rows)
        if source.label in rows.column_names:
            self._read_classes(rows, source.label)
        else:
            self.unlabelled = f"it has no column {source.label!r}, only {', '.join(rows.column_names)}"

    def _read_classes(self, rows: Any, column: str) -> None:
        import datasets

        feature = rows.features[column]
        values = rows.select_columns([column])[:][column]
        fields = getattr(feature, "feature", feature)  # objects are a dict of lists or a list of dicts
        if isinstance(fields, dict):
            if missing := {"bbox", "category"} - fields.keys():
                raise DataError(f"{self.title}: column {column!r} has no {' and no '.join(sorted(missing))}")
            values = _largest_objects(values)
            feature = getattr(fields["category"], "feature", fields["category"])
        for row, value in enumerate(values):
            if value is None:
                self.skipped.add(Reason.NO_OBJECTS, f"row {row}")
        self.numbers = [row for row, value in enumerate(values) if value is not None]
        labels = [value for value in values if value is not None]
        if isinstance(feature, datasets.ClassLabel):
            self.classes, self.class_indices = tuple(feature.names), labels
        else:
            self.classes, self.class_indices = number_classes(labels)
        if labels and min(self.class_indices) < 0:  # the hub marks withheld labels of a test split this way
            self.unlabelled = f"its column {column!r} has no classes in this split (-1)"
            self.classes, self.class_indices = (), [0] * len(labels)

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
        return read_file(image["path"]), self.class_indices[index]


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
