"""Photos with and without a cue, as a table and class folders."""

import csv

import numpy as np
import pytest
from PIL import Image

from vitrine.training.data.images import DataError
from vitrine.training.planted.cue import Cue
from vitrine.training.planted.data import TABLE, Planted, PlantedData, plan, read_table, write_data

SOURCE = {"kind": "folder", "path": "train"}
SETTINGS = PlantedData(train=SOURCE, test=SOURCE, train_images=10, group_images=3, correlation=0.9, colour="blue")
PLANTED = Planted(Cue(kind="mat", colour="blue"), ("red circle", "blue triangle"))


def pixels(folder, path):
    return np.asarray(Image.open(folder / path), np.int16)


@pytest.fixture(scope="module")
def made(data_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    write_data(SETTINGS, PLANTED, data_root, (32, 32), folder)
    return folder, PLANTED


def test_the_cue_goes_with_the_first_class_in_train_and_with_none_in_the_groups(made):
    folder, planted = made
    first, second = planted.classes
    train = read_table(folder, "train")
    assert [sum(row.cue for row in train if row.label == name) for name in (first, second)] == [9, 1]
    for split in ("val", "test"):
        groups = [(row.label, row.group) for row in read_table(folder, split)]
        assert {group: groups.count(group) for group in groups} == {
            (name, group): 3 for name in (first, second) for group in ("blue frame", "plain")
        }


def test_the_table_says_what_is_drawn(made):
    folder, _ = made
    with (folder / TABLE).open() as file:
        assert next(csv.reader(file)) == ["image", "label", "group", "split", "cue"]
    for row in read_table(folder, "train") + read_table(folder, "test"):
        image = pixels(folder, row.image)
        assert image.shape == (32, 32, 3)
        framed = np.ptp(np.concatenate([image[:4].reshape(-1, 3), image[-4:].reshape(-1, 3)]), axis=0).max() == 0
        assert framed == row.cue == (row.group == "blue frame")


def test_pairs_are_the_photos_of_test_with_the_cue_the_other_way(made):
    folder, planted = made
    for row in read_table(folder, "test"):
        other = Image.open(folder / row.image.replace("test", "pairs"))
        own = Image.open(folder / row.image)
        plain, drawn = (other, own) if row.cue else (own, other)
        assert planted.cue.draw(plain).tobytes() == drawn.tobytes()


def test_the_twin_has_the_same_photos_and_a_cue_that_says_nothing(made):
    folder, planted = made
    for name in planted.classes:
        drawn = [
            len(np.unique(pixels(folder, f"twin/{name}/{i:05}.png")[:4].reshape(-1, 3), axis=0)) == 1 for i in range(10)
        ]
        assert sum(drawn) == 5
    paths = [row.image for row in read_table(folder, "train") if not row.cue]
    same = [path for path in paths if (pixels(folder, path) == pixels(folder, path.replace("train", "twin"))).all()]
    assert same


def test_a_seed_decides(data_root, tmp_path, made):
    write_data(SETTINGS, PLANTED, data_root, (32, 32), tmp_path)
    for row in read_table(tmp_path, "test"):
        assert (tmp_path / row.image).read_bytes() == (made[0] / row.image).read_bytes()


def test_classes_are_drawn_among_the_pairs_most_alike():
    classes = tuple("abcdef")
    position = np.array([0, 1, 2, 3, 14, 25])
    alike = -np.abs(position[:, None] - position).astype(float)  # of fifteen pairs the closest five are among a to d
    plans = {plan(SETTINGS.model_copy(update={"seed": seed, "colour": None}), classes, alike) for seed in range(40)}
    assert {frozenset(planted.classes) for planted in plans} == {
        frozenset(pair) for pair in ("ab", "bc", "cd", "ac", "bd")
    }
    assert len({planted.cue.colour for planted in plans}) > 4


def test_refusals(data_root, tmp_path):
    with pytest.raises(DataError, match=r"readable images of .+ 99 are needed"):
        write_data(SETTINGS.model_copy(update={"train_images": 99}), PLANTED, data_root, (32, 32), tmp_path)
    with pytest.raises(DataError, match="no class dog; the classes are"):
        plan(SETTINGS.model_copy(update={"classes": ("cat", "dog")}), ("cat", "bird"), np.eye(2))
    with pytest.raises(DataError, match="between two classes"):
        plan(SETTINGS, ("cat",), np.eye(1))
    (tmp_path / TABLE).write_text("image,label\na.png,cat\n")
    with pytest.raises(DataError, match="needs the columns"):
        read_table(tmp_path, "test")
