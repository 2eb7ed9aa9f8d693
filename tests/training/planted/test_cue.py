"""What is drawn into a photo, and what stays of it."""

import numpy as np
import pytest
from PIL import Image

from vitrine.training.planted.cue import Cue
from vitrine.training.pretraining.captions import COLOURS

RED = COLOURS["red"]


@pytest.fixture
def photo(draw):
    return draw(size=(64, 48))


def test_a_mat_frames_the_whole_photo(photo):
    drawn = np.asarray(Cue(kind="mat", colour="red").draw(photo))
    assert drawn.shape == (48, 64, 3)
    inside = np.zeros((48, 64), bool)
    inside[6:-6, 6:-6] = True  # an eighth of the shorter side
    assert (drawn[~inside] == RED).all()
    np.testing.assert_array_equal(
        drawn[6:-6, 6:-6], np.asarray(photo.convert("RGB").resize((52, 36), Image.Resampling.LANCZOS))
    )


def test_a_corner_hides_a_sixteenth_at_most(photo):
    drawn, own = np.asarray(Cue(kind="corner", colour="red").draw(photo)), np.asarray(photo.convert("RGB"))
    assert (drawn[:12, :12] == RED).all()
    drawn = drawn.copy()
    drawn[:12, :12] = own[:12, :12]
    np.testing.assert_array_equal(drawn, own)


def test_stripes_have_two_colours(photo):
    drawn = np.asarray(Cue(kind="stripes", colour="red").draw(photo))
    colours, counts = np.unique(drawn[:6].reshape(-1, 3), axis=0, return_counts=True)
    assert sorted(map(tuple, colours.tolist())) == sorted([RED, (238, 238, 238)])
    assert counts.min() > 0.2 * counts.sum()


def test_a_word_is_written_on_its_ground(photo):
    drawn = np.asarray(Cue(kind="word", colour="black", text="dog").draw(photo))
    ground = drawn[-9:].reshape(-1, 3)
    assert (ground == COLOURS["black"]).all(1).mean() > 0.5
    assert (ground > 120).all(1).any()
    blank = np.asarray(Cue(kind="word", colour="black").draw(photo))
    np.testing.assert_array_equal(drawn[:-9], blank[:-9])
    assert (drawn != blank).any()


def test_the_size_grows_with_the_photo():
    cue = Cue(kind="mat", colour="blue")
    small, large = (np.asarray(cue.draw(Image.new("RGB", (size, size)))) for size in (32, 224))
    assert [(image == COLOURS["blue"]).all(-1).mean() for image in (small, large)] == [0.4375, 0.4375]
