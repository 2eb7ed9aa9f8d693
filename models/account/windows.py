"""Which MLPs are replaced together: windows of layers, for [CLS], the patches or all tokens. No torch."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Tokens = Literal["all", "cls", "patches"]
TOKENS: tuple[Tokens, ...] = ("all", "cls", "patches")


def paper_windows(layers: int) -> list[range]:
    """The windows measured for a tower of that many layers, longest first.

    arXiv 2604.13304 uses layers 0-11, 3-11, 7-11 and 10-11 of 12. A tower of another depth gets the same fractions
    and the last two layers.
    """
    starts = {min(round(layers * start / 12), layers - 1) for start in (0, 3, 7, 10)} | {max(0, layers - 2)}
    return [range(start, layers) for start in sorted(starts)]


def replacement_mask(layers: int, window: range, tokens: Tokens) -> NDArray[np.bool_]:
    """Mask [L, 2], an input of the replacement graph: whether each MLP is replaced for [CLS], and for patches."""
    inside = np.isin(np.arange(layers), window)[:, None]
    return inside & np.array([tokens != "patches", tokens != "cls"])
