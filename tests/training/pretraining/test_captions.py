"""What captions say about an image, and that the index of a sentence can be computed."""

import pytest
from PIL import Image, ImageDraw

from vitrine.training.pretraining.captions import COLOURS, background_colour, class_prompts, coloured_prompts

NAMES = list(COLOURS)


def bordered(border, interior, size=(12, 9), thickness=1):
    """A picture of one colour with a border of another."""
    image = Image.new("RGB", size, border)
    box = (thickness, thickness, size[0] - 1 - thickness, size[1] - 1 - thickness)
    ImageDraw.Draw(image).rectangle(box, fill=interior)
    return image


@pytest.mark.parametrize("name", NAMES)
def test_a_colour_is_itself_whatever_the_interior(name):
    for interior in COLOURS.values():
        assert NAMES[background_colour(bordered(COLOURS[name], interior))] == name


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((255, 0, 0), "red"),  # (65, 45, 40) from red; from yellow (50, 180, 90)
        ((0, 0, 0), "black"),
        ((255, 255, 255), "white"),
        ((100, 150, 210), "blue"),
        ((140, 100, 70), "brown"),
        ((76, 76, 76), "green"),  # 2,483 from green, squared; 7,803 from black, 8,112 from gray
        ((182, 182, 182), "gray"),  # 8,748 from gray, 8,997 from yellow, 9,408 from white
        ((184, 184, 184), "white"),
    ],
)
def test_nearest_colour_by_hand(rgb, name):
    assert NAMES[background_colour(Image.new("RGB", (4, 4), rgb))] == name


def test_median_of_the_border_is_taken_colour_by_colour():
    """22 of 38 outermost pixels are blue, 16 red: the median is blue, the mean neither."""
    image = bordered(COLOURS["blue"], COLOURS["yellow"])
    for x in range(12):
        image.putpixel((x, 0), COLOURS["red"])
    for y in range(1, 5):
        image.putpixel((0, y), COLOURS["red"])
    assert NAMES[background_colour(image)] == "blue"
    for y in range(5, 9):  # now 20 red, 18 blue
        image.putpixel((0, y), COLOURS["red"])
    assert NAMES[background_colour(image)] == "red"


def test_corners_count_once():
    """3 x 3: of the eight outermost pixels three corners are black, five red. Counted twice, the corners would win."""
    image = Image.new("RGB", (3, 3), COLOURS["red"])
    for place in ((0, 0), (2, 0), (0, 2), (1, 1)):
        image.putpixel(place, COLOURS["black"])
    assert NAMES[background_colour(image)] == "red"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_any_mode(mode):
    assert NAMES[background_colour(Image.new("RGB", (5, 5), "white").convert(mode))] == "white"


def test_prompts_by_hand():
    labels = ("cat", "dog")
    assert class_prompts(labels, "a {} or {}") == ["a cat or cat", "a dog or dog"]
    prompts = coloured_prompts(labels, "a photo of a {}")
    assert prompts[:2] == ["a photo of a cat on a red background", "a photo of a cat on a green background"]
    assert prompts[-1] == "a photo of a dog on a black background"


def test_place_of_a_sentence():
    """The truth that training computes: class * len(COLOURS) + colour."""
    labels = ("cat", "dog", "frog")
    prompts = coloured_prompts(labels, "a {}")
    assert len(set(prompts)) == len(prompts) == 3 * len(COLOURS)
    for class_index, label in enumerate(labels):
        for colour, name in enumerate(COLOURS):
            assert prompts[class_index * len(COLOURS) + colour] == f"a {label} on a {name} background"
