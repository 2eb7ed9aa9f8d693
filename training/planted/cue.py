"""Cues that are drawn into photos: a mat around the photo, a coloured corner, a word.

A mat keeps the whole photo, shrunk inside it; the others cover a part of it.
"""

from __future__ import annotations

from typing import Literal, get_args

from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from vitrine.training.pretraining.captions import COLOURS
from vitrine.training.recipes.image_sources import Section

Kind = Literal["mat", "stripes", "corner", "word"]
Colour = Literal["red", "green", "blue", "brown", "yellow", "white", "gray", "black"]
COLOUR_NAMES: tuple[Colour, ...] = get_args(Colour)  # of `COLOURS`
CONTRAST = (238, 238, 238), (25, 25, 25)  # beside dark colours and beside light ones


class Cue(Section):
    """What is drawn. Sizes are shares of the photo's shorter side, so that they are the same at every resolution."""

    kind: Kind = Field(description="mat: one colour; stripes: a mat of diagonal stripes; corner: a square; word: text")
    colour: Colour = Field(description="colour of the mat, the stripes, the corner, or the word's background")
    text: str = Field(default="", description="the word")

    def draw(self, image: Image.Image) -> Image.Image:
        """The photo with the cue: RGB, of the same size."""
        photo = image.convert("RGB")
        short = min(photo.size)
        if self.kind in ("mat", "stripes"):
            return self._framed(photo, max(1, short // 8))
        drawn = photo.copy()
        brush = ImageDraw.Draw(drawn)
        if self.kind == "corner":
            size = max(1, short // 4)
            brush.rectangle((0, 0, size - 1, size - 1), fill=COLOURS[self.colour])
        else:
            height = max(8, short // 5)
            brush.rectangle((0, photo.height - height, photo.width, photo.height), fill=COLOURS[self.colour])
            font = ImageFont.load_default(0.75 * height)
            middle = photo.width / 2, photo.height - height / 2
            brush.text(middle, self.text, fill=self._contrast, font=font, anchor="mm")
        return drawn

    @property
    def name(self) -> str:
        """As a person who labels groups would call it, and as a prompt may say it ("a photo of a red frame")."""
        return {
            "mat": f"{self.colour} frame",
            "stripes": f"{self.colour} striped frame",
            "corner": f"{self.colour} corner",
            "word": f"word {self.text}",
        }[self.kind]

    @property
    def _contrast(self) -> tuple[int, int, int]:
        return CONTRAST[sum(COLOURS[self.colour]) > 3 * 128]

    def _framed(self, photo: Image.Image, mat: int) -> Image.Image:
        drawn = Image.new("RGB", photo.size, COLOURS[self.colour])
        if self.kind == "stripes":
            brush = ImageDraw.Draw(drawn)
            width = max(1, mat // 2)
            for start in range(-photo.height, photo.width, 3 * width):
                brush.line((start, photo.height, start + photo.height, 0), fill=self._contrast, width=width)
        inside = photo.resize((photo.width - 2 * mat, photo.height - 2 * mat), Image.Resampling.LANCZOS)
        drawn.paste(inside, (mat, mat))
        return drawn
