"""ImageNet's classes: ids and names as open_clip and timm have them."""

from pathlib import Path

import timm
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from vitrine.models.inputs import imagenet
from vitrine.models.inputs.imagenet import class_label, unknown_ids


def test_the_table_is_the_libraries():
    """timm's list has ImageNet's order, and so do open_clip's names."""
    ids = (Path(timm.__file__).parent / "data/_info/imagenet_synsets.txt").read_text().split()
    lines = Path(imagenet.__file__).with_suffix(".tsv").read_text().splitlines()
    assert [tuple(line.split("\t")) for line in lines] == list(zip(ids, IMAGENET_CLASSNAMES, strict=True))


def test_labels_of_ids():
    names = ["n01440764", "n02115641", "n15075141", "n00005787", "n1440764", "N01440764", "n01440764x", "cat", ""]
    labels = ["tench", "dingo", "toilet paper", *names[3:]]
    assert [class_label(name) for name in names] == labels
    assert unknown_ids(names) == ["n00005787"]
