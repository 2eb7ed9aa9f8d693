"""From folders to labels: WordNet ids, `data.classes`, label files."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from vitrine.training.data.classes import check_classes
from vitrine.training.data.held_out import held_out
from vitrine.training.data.images import DataError
from vitrine.training.data.sources import open_images
from vitrine.training.recipes.image_sources import FolderSource
from vitrine.training.recipes.recipe import DataSection

FOLDER = FolderSource(kind="folder", path=".")
CLIP = SimpleNamespace(transform=lambda: lambda image: torch.zeros(3))


def folders(root, **images):
    for name, count in images.items():
        (root / name).mkdir()
        for number in range(count):
            Image.new("RGB", (4, 4)).save(root / name / f"{number}.png")


def section(**fields):
    return DataSection(name="x", train=FOLDER, val=FOLDER, **fields)


def truth(images):
    """The label of every image."""
    return [images.labels[index] for _, batch in images.batches() for index in batch]


def opened(data, root):
    images = held_out(data, root, CLIP, workers=0)
    check_classes(data, images.labels, images.data)
    return images


def test_wordnet_ids_are_imagenets_names(tmp_path):
    folders(tmp_path, n01440764=2, n02102040=1, other=1)
    images = opened(section(), tmp_path)
    assert images.labels == ("tench", "English Springer Spaniel", "other")
    assert truth(images) == ["tench", "tench", "English Springer Spaniel", "other"]


def test_two_folders_of_one_label_are_one_class(tmp_path):
    """ImageNet has two of sunglasses; and `data.classes` goes before ImageNet's name."""
    folders(tmp_path, n04355933=1, n04356056=2, n01440764=1, n999=1)
    images = opened(section(classes={"n999": "my cat", "n01440764": "my cat"}), tmp_path)
    assert images.labels == ("my cat", "sunglasses")
    assert truth(images) == ["my cat", "sunglasses", "sunglasses", "sunglasses", "my cat"]
    assert images.data.summary() == [f"{tmp_path}: 5 images in 2 classes"]


def test_labels_of_a_file(tmp_path):
    folders(tmp_path, cat=1, n01440764=1)
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfa, b\r\ntench\r\ncat\r\n")
    images = opened(section(labels_file="labels.txt"), tmp_path)
    assert images.labels == ("a, b", "tench", "cat")
    assert truth(images) == ["cat", "tench"]
    assert held_out(section(labels_file="labels.txt"), tmp_path, CLIP, labels=("cat", "tench")).labels == (
        "cat",
        "tench",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"n00005787: WordNet ids that are not among ImageNet's 1,000 classes; .* as { \"n00005787\" = "),
        (
            {"labels": ("dog",)},
            r"not among the labels: cat, n00005787. Add .* such as { \"cat\" = \"dog\" }; .*= false",
        ),
        ({"classes": {"n00005787": "se"}, "labels": ("sea", "cat")}, "not among the labels: se."),
        (
            {"classes": {"n00005787": "sea", "cot": "cat"}},
            "data.classes: 'cot' is not a class of .*; did you mean 'cat'?",
        ),
        (
            {"classes": {"n00005787": "sea", "9": "cat"}},
            "'9' is not a class of .*; the classes are the names of",
        ),
        ({"labels_file": "none.txt"}, "data.labels_file: the file of labels .*none.txt cannot be read"),
    ],
)
def test_classes_that_are_no_labels(tmp_path, fields, message):
    folders(tmp_path, cat=1, n00005787=1)
    with pytest.raises(DataError, match=message):
        opened(section(**fields), tmp_path)


def test_a_label_that_is_none_of_the_recipes(tmp_path):
    """Of a folder that val does not have: nothing else would tell."""
    folders(tmp_path, cat=2)
    (tmp_path / "train").mkdir()
    folders(tmp_path / "train", n9=1)
    data = section(classes={"n9": "my dgo"}, labels=("cat", "my dog"))
    train = open_images(FolderSource(kind="folder", path="train"), tmp_path, CLIP.transform(), classes=data.classes)
    with pytest.raises(
        DataError, match="'my dgo', given for 'n9', is not a label of the recipe; did you mean 'my dog'"
    ):
        check_classes(data, data.labels, train)
    check_classes(section(classes={"n9": "my dgo"}), ("cat",), train)  # val's classes are no list that must hold it
