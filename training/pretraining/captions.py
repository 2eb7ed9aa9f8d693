"""Captions for small labelled images: their class, and their background colour as measured from the pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image

COLOURS = {
    "red": (190, 45, 40),
    "green": (75, 115, 45),
    "blue": (90, 140, 200),
    "brown": (130, 95, 60),
    "yellow": (205, 180, 90),
    "white": (238, 238, 238),
    "gray": (128, 128, 128),
    "black": (25, 25, 25),
}  # RGB, typical of photos


def background_colour(image: Image.Image) -> int:
    """Index of the colour in `COLOURS` nearest to the median of the image's border pixels."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    distance = np.square(np.median(border, axis=0) - np.array(list(COLOURS.values()))).sum(axis=1)
    return int(distance.argmin())


def class_prompts(labels: tuple[str, ...], template: str) -> list[str]:
    """One prompt per label."""
    return [template.replace("{}", label) for label in labels]


def coloured_prompts(labels: tuple[str, ...], template: str) -> list[str]:
    """One prompt per label and colour, label by label: "a photo of a cat on a blue background"."""
    return [f"{prompt} on a {colour} background" for prompt in class_prompts(labels, template) for colour in COLOURS]
