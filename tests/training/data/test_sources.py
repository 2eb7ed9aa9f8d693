"""Every kind of source: classes, images by number, names, broken images, and the errors of unusable sources."""

import io
import os
import pickle
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from vitrine.models.images.formats import FORMATS
from vitrine.training.data.held_out import held_out
from vitrine.training.data.images import DataError, load
from vitrine.training.data.sources import TORCHVISION, open_images
from vitrine.training.recipes.image_sources import FolderSource, HuggingFaceSource, TorchvisionSource, WebDatasetSource
from vitrine.training.recipes.recipe import DataSection

NO_IMAGE = b"no image"
NO_FORMAT = f"this is not an image in a supported format ({FORMATS})"


def colour(image):
    """The first pixel as a separate picture: [3, 1, 1]."""
    assert image.mode == "RGB"
    return torch.tensor(image.getpixel((0, 0)), dtype=torch.float32)[:, None, None]


def encoded(number, form="PNG"):
    """A picture of colour (number, 0, 0)."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, form, **({"lossless": True} if form == "WEBP" else {}))
    return buffer.getvalue()


def reds(images, indices=None, workers=0):
    """(red of each image, its class), read through `load`."""
    batches = [list(range(len(images))) if indices is None else indices]
    ((pixels, classes),) = load(images, batches, workers)
    return list(zip(pixels[:, 0, 0, 0].int().tolist(), classes.tolist(), strict=True))


def class_folders(root, **classes):
    """root/<class>/<number>.png; None writes a broken file."""
    for name, numbers in classes.items():
        (root / name).mkdir(parents=True)
        for place, number in enumerate(numbers):
            (root / name / f"{place}.png").write_bytes(NO_IMAGE if number is None else encoded(number))


# Folders


def test_folder(tmp_path):
    class_folders(tmp_path / "train", cat=[10, 11], ant=[20])
    images = open_images(FolderSource(kind="folder", path="train"), tmp_path, colour)
    assert images.classes == ("ant", "cat")
    assert reds(images) == [(20, 0), (10, 1), (11, 1)]
    assert images.name(1) == str(tmp_path / "train/cat/0.png")


def test_broken_image_in_a_folder(tmp_path):
    class_folders(tmp_path, cat=[10, None, 12])
    images = open_images(FolderSource(kind="folder", path="."), tmp_path, colour, max_broken=0.4)
    assert reds(images) == [(10, 0), (12, 0), (12, 0)]
    assert images.broken == {str(tmp_path / "cat/1.png"): NO_FORMAT}


@pytest.mark.parametrize("kind", ["missing", "empty", "without images"])
def test_folder_without_images_is_named(tmp_path, kind):
    root = tmp_path / "images"
    if kind != "missing":
        root.mkdir()
    if kind == "without images":
        (root / "class").mkdir()
        (root / "class/notes.txt").touch()
    with pytest.raises(DataError, match=f"no images under {root}"):
        open_images(FolderSource(kind="folder", path="images"), tmp_path, colour)


# torchvision


def cifar10(split="val"):
    return TorchvisionSource(kind="torchvision", name="CIFAR10", split=split)


def write_cifar10(root):
    """CIFAR-10 as torchvision unpacks it: five batches of two training images (0 to 9) and two test images (50, 51)."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name, start in [*((f"data_batch_{i + 1}", 2 * i) for i in range(5)), ("test_batch", 50)]:
        data = np.zeros((2, 3, 1024), np.uint8)
        data[:, 0] = np.arange(start, start + 2)[:, None]
        (folder / name).write_bytes(pickle.dumps({"data": data.reshape(2, -1), "labels": [1, 0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane", "automobile"]}))


@pytest.fixture
def no_checksums(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5: Path(path).exists())


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)


@pytest.mark.parametrize("workers", [0, 1])
def test_torchvision_set_under_the_data_root(tmp_path, no_checksums, no_network, workers):
    write_cifar10(tmp_path)
    train, val = (open_images(cifar10(split), tmp_path, colour) for split in ("train", "val"))
    assert train.classes == val.classes == ("airplane", "automobile")
    assert reds(train, workers=workers) == [(number, 1 - number % 2) for number in range(10)]
    assert reds(val, workers=workers) == [(50, 1), (51, 0)]
    assert train.name(3) == "CIFAR10[train] row 3"


def test_torchvision_set_is_downloaded_if_it_is_not_there(tmp_path, no_checksums, monkeypatch):
    def download(url, root, filename, md5):
        write_cifar10(tmp_path)

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", download)
    assert reds(open_images(cifar10(), tmp_path, colour)) == [(50, 1), (51, 0)]


def test_failed_download_is_reported(tmp_path, no_network):
    with pytest.raises(
        DataError, match=rf"^CIFAR10\[val\] is not in {tmp_path} and cannot be downloaded: .*no network"
    ):
        open_images(cifar10(), tmp_path, colour)


@pytest.mark.parametrize(
    ("name", "hint"), [("CIFAR-100", "did you mean CIFAR100?"), ("Cityscapes", "known sets: CIFAR10, CIFAR100")]
)
def test_unknown_torchvision_set_is_refused(tmp_path, name, hint):
    source = TorchvisionSource(kind="torchvision", name=name, split="train")
    message = re.escape(f"{name} is not one of torchvision's classification sets; {hint}")
    with pytest.raises(DataError, match=f"^{message}"):
        open_images(source, tmp_path, colour)


def test_broken_image_in_a_torchvision_set(tmp_path):
    class_folders(tmp_path / "country211/valid", AD=[10, None], CH=[20])
    source = TorchvisionSource(kind="torchvision", name="Country211", split="val")
    images = open_images(source, tmp_path, colour, max_broken=0.4)
    assert images.classes == ("AD", "CH")
    assert reds(images) == [(10, 0), (20, 1), (20, 1)]
    assert list(images.broken) == [str(tmp_path / "country211/valid/AD/1.png")]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_knows_the_sets_and_their_splits(name, tmp_path):
    """Without the data, each must get as far as reporting them missing."""
    for options in TORCHVISION[name]:
        with pytest.raises(RuntimeError, match=r"(?i)not found|corrupted"):
            getattr(torchvision.datasets, name)(str(tmp_path), **options)


# Hugging Face


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("huggingface")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def parquet(root, columns, features, split="train"):
    """root/hub/<split>.parquet, as a data set of the hub would be laid out."""
    (root / "hub").mkdir(exist_ok=True)
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows.to_parquet(root / f"hub/{split}.parquet")


def hub(**changes):
    return HuggingFaceSource(**{"kind": "huggingface", "id": "hub", "split": "train"} | changes)


def embedded(*numbers):
    return [{"bytes": NO_IMAGE if number is None else encoded(number), "path": None} for number in numbers]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_hugging_face_set_with_named_classes(tmp_path, workers):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])}
    parquet(tmp_path, {"image": embedded(1, 2), "label": [2, 0]}, features)
    parquet(tmp_path, {"image": embedded(3), "label": [1]}, features, split="validation")
    images = open_images(hub(), tmp_path, colour)
    assert images.classes == ("ant", "bee", "cat")
    assert reds(images, workers=workers) == [(1, 2), (2, 0)]
    assert images.name(1) == "hub[train] row 1"
    assert reds(open_images(hub(split="validation"), tmp_path, colour), workers=workers) == [(3, 1)]


def test_what_save_to_disk_wrote(tmp_path):
    """One split, or several by name."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    rows = datasets.Dataset.from_dict({"image": embedded(1, 2), "label": [1, 0]}, features=features)
    rows.save_to_disk(tmp_path / "hub")
    datasets.DatasetDict({"train": rows, "val": rows.select([1])}).save_to_disk(tmp_path / "both")
    assert reds(open_images(hub(), tmp_path, colour)) == [(1, 1), (2, 0)]
    assert reds(open_images(hub(id="both", split="val"), tmp_path, colour)) == [(2, 0)]
    with pytest.raises(DataError, match=r"^both was saved without split 'test'; it has train, val$"):
        open_images(hub(id="both", split="test"), tmp_path, colour)


@pytest.mark.parametrize(
    ("values", "classes", "expected"),
    [
        (["cat", "ant", "cat"], ("ant", "cat"), [1, 0, 1]),
        ([10, 9, 10], ("9", "10"), [1, 0, 1]),
        (["cat", None, "ant"], ("ant", "cat"), [1, 0]),
    ],
)
def test_hugging_face_classes_without_names_are_the_values(tmp_path, values, classes, expected):
    kind = datasets.Value("int64" if isinstance(values[0], int) else "string")
    parquet(tmp_path, {"photo": embedded(1, 2, 3), "species": values}, {"photo": datasets.Image(), "species": kind})
    images = open_images(hub(image="photo", label="species"), tmp_path, colour)
    assert images.classes == classes
    assert [class_index for _, class_index in reds(images)] == expected


def test_broken_image_in_a_hugging_face_set(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}
    parquet(tmp_path, {"image": [*embedded(1, None, 3), None], "label": [0, 1, 1, 0]}, features)
    images = open_images(hub(), tmp_path, colour, max_broken=0.5)
    assert reds(images) == [(1, 0), (3, 1), (3, 1), (1, 0)]
    assert images.broken == {
        "hub[train] row 1": NO_FORMAT,
        "hub[train] row 3": "the row has no image",
    }


def test_hugging_face_folder_of_images(tmp_path):
    class_folders(tmp_path / "hub/train", ant=[10, None], bee=[20])
    images = open_images(hub(), tmp_path, colour, max_broken=0.4)
    assert images.classes == ("ant", "bee")
    assert reds(images) == [(10, 0), (20, 1), (20, 1)]
    assert images.broken.keys() == {"hub[train] row 1"}


CORNERS = [[[0, 0, 9, 9], [5, 5, 15, 30]], [[90, 90, 99, 95]], [], [[80, 80, 99, 99], [1, 1, 40, 40]]]
SIZES = [[[0, 0, 9, 9], [5, 5, 10, 25]], [[90, 90, 9, 5]], [], [[80, 80, 19, 19], [1, 1, 39, 39]]]


@pytest.mark.parametrize("boxes", [CORNERS, SIZES], ids=["corners", "width and height"])
@pytest.mark.parametrize("layout", ["dict of lists", "list of dicts"])
def test_class_of_a_detection_set_is_the_largest_objects(tmp_path, boxes, layout):
    categories = [[0, 1], [2], [], [1, 0]]
    fields = {"bbox": datasets.List(datasets.Value("float32")), "category": datasets.ClassLabel(names=["a", "b", "c"])}
    if layout == "dict of lists":
        feature = {name: datasets.List(field) for name, field in fields.items()}
        rows = [{"bbox": b, "category": c} for b, c in zip(boxes, categories, strict=True)]
    else:
        feature = datasets.List(fields)
        rows = [
            [{"bbox": one, "category": category} for one, category in zip(b, c, strict=True)]
            for b, c in zip(boxes, categories, strict=True)
        ]
    parquet(tmp_path, {"image": embedded(1, 2, 3, 4), "objects": rows}, {"image": datasets.Image(), "objects": feature})
    images = open_images(hub(label="objects"), tmp_path, colour)
    assert images.classes == ("a", "b", "c")
    assert reds(images) == [(1, 1), (2, 2), (4, 0)]  # row 2 has no objects
    assert images.name(2) == "hub[train] row 3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "picture"}, r"hub\[train\] has no column 'picture'; it has image, label, text"),
        ({"label": "class"}, r"hub\[train\] has no column 'class'; it has image, label, text"),
        ({"image": "text"}, r"hub\[train\]: column 'text' is not an image"),
        ({"label": "boxes"}, r"hub\[train\]: column 'boxes' has no category"),
        ({"split": "test"}, r"hub\[test\] can be loaded neither"),
        ({"id": "nobody/nothing"}, r"nobody/nothing\[train\] can be loaded neither from the folder .* nor from the"),
    ],
)
def test_hugging_face_sets_that_cannot_be_used(tmp_path, changes, message):
    names = datasets.ClassLabel(names=["ant"])
    columns = {"image": embedded(1), "label": [0], "text": ["x"], "withheld": [-1], "boxes": [{"bbox": [[0, 0, 1, 1]]}]}
    features = {
        "image": datasets.Image(),
        "label": names,
        "text": datasets.Value("string"),
        "withheld": names,
        "boxes": {"bbox": datasets.List(datasets.List(datasets.Value("float32")))},
    }
    message = message.replace("image, label, text", "image, label, text, withheld, boxes")
    parquet(tmp_path, columns, features)
    with pytest.raises(DataError, match=message):
        open_images(hub(**changes), tmp_path, colour)


def test_hugging_face_images_without_classes(tmp_path):
    """No column `label`, if none is named, and a test split's withheld classes."""
    features = {"image": datasets.Image(), "withheld": datasets.ClassLabel(names=["ant"])}
    parquet(tmp_path, {"image": embedded(1, 2), "withheld": [-1, 0]}, features)
    for source, reason in (
        (hub(), "it has no column 'label', only image, withheld"),
        (hub(label="withheld"), "its column 'withheld' has no classes in this split (-1)"),
    ):
        images = open_images(source, tmp_path, colour)
        assert (images.classes, reds(images)) == ((), [(1, 0), (2, 0)])
        assert images.summary()[0] == f"hub[train]: 2 images without classes: {reason}"


# WebDataset


def tar(path, files):
    """A tar file of {name: content}."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def shards(pattern="shards/{00..01}.tar", classes=None):
    return WebDatasetSource(kind="webdataset", shards=pattern, classes=classes)


@pytest.mark.parametrize("workers", [0, 1])
def test_webdataset_shards_with_indices(tmp_path, workers):
    tar(
        tmp_path / "shards/00.tar",
        {
            "a/1.cls": b"1\n",
            "a/1.png": encoded(1),
            "a/2.json": b"{}",
            "a/2.cls": b"0",
            "a/2.WEBP": encoded(2, "WEBP"),
            "a/2.txt": b"a caption",
        },
    )
    tar(
        tmp_path / "shards/01.tar",
        {"readme.md": b"?", "v1.5/x.depth.png": b"", "v1.5/x.png": encoded(3), "v1.5/x.cls": b"2"},
    )
    images = open_images(shards(), tmp_path, colour)
    assert images.classes == ("0", "1", "2")
    assert reds(images, workers=workers) == [(1, 1), (2, 0), (3, 2)]
    assert images.name(2) == f"{tmp_path}/shards/01.tar: v1.5/x"
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    assert open_images(shards(classes="names.txt"), tmp_path, colour).classes == ("ant", "bee", "cat", "dog")


def test_webdataset_shards_with_names(tmp_path):
    files = {"1.png": encoded(1), "1.txt": b"dog\n", "2.png": encoded(2), "2.txt": b"ant"}
    files |= {"3.png": encoded(3), "3.txt": b"dog", "4.png": encoded(4), "4.txt": b" ant "}
    tar(tmp_path / "shards/00.tar", files)
    images = open_images(shards("shards/00.tar"), tmp_path, colour)
    assert (images.classes, reds(images)) == (("ant", "dog"), [(1, 1), (2, 0), (3, 1), (4, 0)])
    (tmp_path / "names.txt").write_text("dog\nbee\nant\n")
    images = open_images(shards("shards/00.tar", classes="names.txt"), tmp_path, colour)
    assert (images.classes, reds(images)) == (("dog", "bee", "ant"), [(1, 0), (2, 2), (3, 0), (4, 2)])


def test_broken_image_in_a_shard(tmp_path):
    tar(tmp_path / "x.tar", {"1.jpg": NO_IMAGE, "1.cls": b"0", "2.jpg": encoded(7, "PNG"), "2.cls": b"1"})
    images = open_images(shards("x.tar"), tmp_path, colour, max_broken=0.5)
    assert reds(images) == [(7, 1), (7, 1)]
    assert images.broken == {f"{tmp_path}/x.tar: 1": NO_FORMAT}


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"1.png": b"", "2.png": b"", "2.cls": b"0"}, "1 of 2 samples have neither .cls (an index) nor .txt"),
        (
            {"1.png": b"", "1.cls": b"cat"},
            "1 of 1 samples have a .cls that is not the index of a class, such as '1': 'cat'",
        ),
        ({"1.png": b"", "1.cls": b"0", "2.png": b"", "2.txt": b"a"}, "1 of 2 samples have only .txt"),
        (
            {"1.png": b"", "1.txt": b"a car", "2.png": b"", "2.txt": b"a dog"},
            "its 2 texts are captions, not classes: 2 of them differ",
        ),
    ],
)
def test_shards_without_classes_are_images_to_train_on(tmp_path, files, why):
    """Where classes are needed it is said why there are none."""
    tar(tmp_path / "x.tar", {name: encoded(7) if name.endswith("png") else value for name, value in files.items()})
    images = open_images(shards("x.tar"), tmp_path, colour)
    assert images.classes == ()
    assert set(reds(images)) == {(7, 0)}
    assert why in images.summary()[0]
    with pytest.raises(DataError, match=re.escape(why)):
        images.require_classes()
    (tmp_path / "names").write_text("dog\nant")
    with pytest.raises(DataError, match=r"x\.tar"):  # who names classes wants them
        open_images(shards("x.tar", "names"), tmp_path, colour)


@pytest.mark.parametrize(
    ("files", "classes", "message"),
    [
        ({"1.png": b"", "1.cls": b"2"}, "ant\nbee", "x.tar: 1 has class 2, which is not one of the 2 classes of names"),
        ({"1.png": b"", "1.txt": b"cat"}, "ant", "x.tar: 1 has class 'cat', which is not one of the 1 classes"),
        ({"1.txt": b"cat"}, None, r"no images in .*x.tar. left out, samples without an image: 1 \(x.tar/1\)"),
    ],
)
def test_shards_that_cannot_be_used(tmp_path, files, classes, message):
    tar(tmp_path / "x.tar", files)
    if classes:
        (tmp_path / "names").write_text(classes)
    with pytest.raises(DataError, match=message):
        open_images(shards("x.tar", "names" if classes else None), tmp_path, colour)


def test_a_folder_of_images_alone_has_no_classes(tmp_path):
    class_folders(tmp_path, flat=[10, 11])
    (tmp_path / "flat/notes.txt").touch()
    source = FolderSource(kind="folder", path="flat")
    images = open_images(source, tmp_path, colour)
    assert (images.classes, reds(images)) == ((), [(10, 0), (11, 0)])
    assert images.summary() == [
        f"{tmp_path}/flat: 2 images without classes: its images are not in folders named after classes",
        "left out, not images, judging by their names: 1 (notes.txt)",
    ]
    section = DataSection(name="x", train=source, val=source, labels=("cat",))
    images = held_out(section, tmp_path, SimpleNamespace(transform=lambda: colour), workers=0)
    (batch,) = images.batches()
    assert (batch[1].tolist(), images.labels) == ([-1, -1], ("cat",))
    (reason,) = images.left_out
    assert "flat has no classes, so predictions cannot be checked" in reason


def test_folders_that_are_no_classes(tmp_path):
    """All images are taken, those beside the folders, too."""
    class_folders(tmp_path / "photos", may=[10], june=[20, 30])
    Image.new("RGB", (4, 4), (40, 0, 0)).save(tmp_path / "photos/top.png")
    images = open_images(FolderSource(kind="folder", path="photos", classes=False), tmp_path, colour)
    assert (images.classes, reds(images)) == ((), [(40, 0), (20, 0), (30, 0), (10, 0)])
    assert images.summary() == [f"{tmp_path}/photos: 4 images without classes: the recipe sets classes = false"]


def test_links_to_folders_are_classes_and_names_are_any_bytes(tmp_path):
    class_folders(tmp_path / "elsewhere", bee=[3])
    class_folders(tmp_path / "train", ant=[1], cat=[2])
    (tmp_path / "train/bee").symlink_to(tmp_path / "elsewhere/bee")
    (tmp_path / "train/cat/up").symlink_to(tmp_path / "train")
    (tmp_path / "train/cat" / os.fsdecode(b"\xff.png")).write_bytes(NO_IMAGE)
    images = open_images(FolderSource(kind="folder", path="train"), tmp_path, colour, max_broken=0.4)
    assert images.classes == ("ant", "bee", "cat")
    assert reds(images) == [(1, 0), (3, 1), (2, 2), (1, 0)]  # the broken one gives way to the next
    assert list(images.broken) == [rf"{tmp_path}/train/cat/\xff.png"]
    assert images.summary()[1:] == [
        "left out, folders that contain themselves, or that too many links lead to: 1 (cat/up)"
    ]


def test_images_are_numbered_as_in_earlier_versions(tmp_path):
    """As by torchvision's ImageFolder: a checkpoint of theirs goes on with the same images."""
    for name in ("a/b.png", "a/a/z.png", "a/a b/y.png", "a/z.jpg", "b/1.png", "a/a/b/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(1))
    images = open_images(FolderSource(kind="folder", path="."), tmp_path, colour)
    theirs = torchvision.datasets.ImageFolder(str(tmp_path)).samples
    assert [images.name(index) for index in range(len(images))] == [path for path, _ in theirs]


def test_one_image_of_a_sample_is_taken_and_the_others_are_named(tmp_path):
    files = {"a.input.jpg": encoded(1), "a.cls": b"0", "b.depth.png": encoded(9), "b.PNG": encoded(2), "b.cls": b"1"}
    files |= {"c.one.png": encoded(3), "c.two.png": encoded(9), "c.cls": b"1", "c.json": b"{}", "._c.png": b"x"}
    tar(tmp_path / "x.tar", files)
    images = open_images(shards("x.tar"), tmp_path, colour)
    assert reds(images) == [(1, 0), (2, 1), (3, 1)]
    assert images.summary() == [
        f"{tmp_path}/x.tar: 3 images in 2 classes",
        "left out, not images, classes or texts of samples: 1 (x.tar/c.json)",
        "left out, hidden files, or files of an operating system: 1 (x.tar/._c.png)",
        "left out, additional images of a sample: 2 (x.tar/b.depth.png; x.tar/c.two.png)",
    ]


def test_shards_by_a_glob_or_a_folder(tmp_path):
    for number in range(3):
        tar(tmp_path / f"shards [1]/{number}.tar", {"1.png": encoded(number), "1.cls": b"0"})
    (tmp_path / "shards [1]/readme.md").touch()
    for pattern in ("shards [1]", "shards [1]/{0,1,2}.tar", "shards*/*", "**/*.tar"):
        assert [red for red, _ in reds(open_images(shards(pattern), tmp_path, colour))] == [0, 1, 2], pattern


@pytest.mark.parametrize("kind", ["missing", "gzip", "no tar", "cut at 0", "cut at 514", "cut at 580", "cut at 1100"])
def test_unreadable_shard_is_named(tmp_path, kind):
    path = tmp_path / "shards/01.tar"
    tar(tmp_path / "shards/00.tar", {"1.png": encoded(1), "1.cls": b"0"})
    if kind == "no tar":
        path.write_bytes(b"x" * 2000)
    elif kind == "gzip":
        with tarfile.open(path, "w:gz"):
            pass
    elif kind != "missing":
        path.write_bytes((tmp_path / "shards/00.tar").read_bytes()[: int(kind.removeprefix("cut at "))])
    with pytest.raises(DataError, match=f"^{path} is not a readable tar file"):
        open_images(shards(), tmp_path, colour)
    source = shards().model_copy(update={"skip_broken": True})
    images = open_images(source, tmp_path, colour)
    assert reds(images) == [(1, 0)]
    assert images.summary()[1].startswith("left out, damaged or missing: 1 (01.tar: ")


def test_missing_class_names_are_reported(tmp_path):
    tar(tmp_path / "x.tar", {"1.png": b"", "1.cls": b"0"})
    with pytest.raises(DataError, match=f"the file of class names {tmp_path}/names cannot be read: No such"):
        open_images(shards("x.tar", "names"), tmp_path, colour)
