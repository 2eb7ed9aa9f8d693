"""Candidate words for the labels of features.

`labels` are the bundle's labels, `imagenet` open_clip's names of ImageNet's classes, `colours` and `textures` lists of
plain words; anything else is a text file with one word or phrase per line ('#' begins a comment).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from torch import Tensor, cat

from vitrine.models.clip.loading import Clip
from vitrine.models.errors import VitrineError
from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.lists import read_names
from vitrine.models.progress import Progress

COLOURS = (
    *("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "brown", "black", "white", "gray"),
    *("beige", "gold", "silver", "a bright background", "a dark background", "a black and white photo", "neon light"),
)
TEXTURES = (
    *(
        "stripes",
        "dots",
        "a checked pattern",
        "a grid",
        "a mesh",
        "a knitted fabric",
        "lace",
        "fur",
        "feathers",
        "scales",
    ),
    *("leather", "wood grain", "stone", "brick", "rust", "glass", "metal", "plastic", "paper", "sand", "snow", "ice"),
    *(
        "water",
        "waves",
        "fire",
        "smoke",
        "clouds",
        "sky",
        "grass",
        "leaves",
        "flowers",
        "bubbles",
        "cracks",
        "wrinkles",
    ),
    *("text", "numbers", "a face", "hands", "eyes", "a crowd", "a close-up", "a blurry photo", "a drawing", "a logo"),
)
NAMED = ("labels", "imagenet", "colours", "textures")


class VocabularyError(VitrineError, ValueError):
    """A vocabulary cannot be used; the message says which and why."""


def read_vocabulary(sources: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The words of all `sources` (`NAMED` ones or files), in order and without duplicates. labels: of the bundle.

    Raises `VocabularyError` if a file cannot be read, or if there are fewer than two words.
    """
    named = dict(zip(NAMED, (labels, IMAGENET_CLASSNAMES, COLOURS, TEXTURES), strict=True))
    words: dict[str, None] = {}
    for source in sources:
        words |= dict.fromkeys(named[source] if source in named else _read(Path(source)))
    if len(words) < 2:
        raise VocabularyError(f"{', '.join(sources)}: {len(words)} words; a label must be chosen from at least two")
    return list(words)


def embed(clip: Clip, words: Sequence[str], templates: Sequence[str], progress: Progress) -> Tensor:
    """Unit embeddings [V, D], after subtracting the vocabulary's mean, which carries no information about any word."""
    task = progress.task("vocabulary", len(words), "words")
    rows = []
    for word in words:
        rows.append(clip.encode_labels([word], list(templates)).float().cpu())
        task.advance()
    embeddings = cat(rows)
    return F.normalize(embeddings - embeddings.mean(0), dim=-1)


def _read(file: Path) -> list[str]:
    try:
        lines = [line.partition("#")[0].strip() for line in read_names(file, "words")]
    except InputError as error:
        raise VocabularyError(f"vocabulary {file}: {error}; give a file, or one of {', '.join(NAMED)}") from error
    return [line for line in lines if line]
