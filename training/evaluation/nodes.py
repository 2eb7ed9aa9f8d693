"""The nodes of an image that curves insert and delete (`training.evaluation.curves`), and those of a CLT.

A kind of nodes says how it ranks an image's nodes, which of them are active, and what the network makes of the image
with some of them at their usual values.

N nodes, R runs (an image, edited in one way each), T tokens, d width, D embedding size.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.edited import Edited
from vitrine.training.evaluation.rankings import Rankings


class Ranked(NamedTuple):
    """The nodes of one image."""

    scores: dict[str, Tensor]  # [N] by ranking: the largest first
    active: Tensor  # [N] bool: those that are ranked, and that fractions are of
    everything: Tensor  # [N] bool: those that insertion sets to their usual values, unless they are inserted


class Nodes(Protocol):
    """One kind of nodes."""

    def ranked(self, pixels: Tensor, direction: Tensor) -> Ranked:
        """Of one image [1, 3, H, W], for the logit of a direction in embedding space [D]."""
        ...

    def run(self, embedded: Tensor, edited: Tensor) -> Tensor:
        """[CLS] before ln_post [R, d], of embedded images [R, T, d] (`Tower.embed`) with the nodes `edited` [R, N] bool
        at their usual values."""
        ...


class CltNodes:
    """Features (layer, index) of a CLT, over all tokens; usual are their means (`models.dictionary.edited`).

    Args:
        clip, clt: on the same device; the CLT on raw activations, in evaluation mode.
        mean: mean activations [L, 2, F] at [CLS] and over patches.
        seed: of the random ranking.
    """

    def __init__(self, clip: Clip, clt: CrossLayerTranscoder, mean: Tensor, seed: int = 0) -> None:
        mean = mean.to(clt.decoders[0].bias)
        self.rankings, self.edited = Rankings(clip, clt, mean, seed), Edited(clip.tower, clt, mean)
        self._shape = clt.layers, clt.features

    def ranked(self, pixels: Tensor, direction: Tensor) -> Ranked:
        """As `Nodes`."""
        scores, active = self.rankings(pixels, direction)
        flat = active.flatten()
        return Ranked({name: of_nodes.flatten() for name, of_nodes in scores.items()}, flat, flat)

    @torch.no_grad()
    def run(self, embedded: Tensor, edited: Tensor) -> Tensor:
        """As `Nodes`."""
        return self.edited(embedded, edited.unflatten(1, self._shape))
