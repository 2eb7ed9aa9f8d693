"""The running network with changes of features and directions made in it, in torch: how a proposal is measured.

    stream  = stream + sum of (gain <stream, u> + offset) u                          before each block, after the last
    stream  = stream + attention + MLP + sum over sources of (gain z + offset) W     of a CLT's features
    stream  = stream + s (gain z + offset) W_dec                                     of residual SAEs' features

with z of the stream as changed so far, so that no change changes nothing. B images, T tokens, d width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.replacement import which_are_cls
from vitrine.models.dictionary.residual_sae import ResidualSaes, standardise
from vitrine.models.interventions.changes import Changes, InterventionError
from vitrine.training.planted.truth import Dictionary, dense


class Running:
    """A tower, changed. Raises `InterventionError` for changes of heads and rows, which no proposal makes."""

    def __init__(self, tower: Tower, dictionary: Dictionary | None, changes: Changes) -> None:
        """dictionary: the one whose features are changed, if any."""
        if any(np.any(factors != 1) for factors in (changes.heads, changes.attention, changes.mlp)):
            raise InterventionError("a proposal changes features: heads and rows are not measured here")
        if len(changes.layers) and dictionary is None:
            raise InterventionError(f"there are no features of {changes.dictionary} here")
        self.tower, self.dictionary, self.changes = tower, dictionary, changes
        self.directions = torch.from_numpy(changes.directions)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Unit embeddings [B, D] of normalised pixels [B, 3, H, W]."""
        stream = self.tower.embed(pixels)
        differences: list[tuple[NDArray[np.int64], Tensor]] = []  # by layer: the features, and z' - z [B, T, n]
        for layer in range(self.tower.layers):
            stream = self._directed(layer, stream)
            stream = stream + self.tower.attention(layer, stream)
            mlp_in, mlp_out = self.tower.mlp(layer, stream)
            stream = stream + mlp_out
            if isinstance(self.dictionary, CrossLayerTranscoder):
                differences.append(self._difference(layer, mlp_in))
                stream = stream + self._written(self.dictionary, layer, differences)
            elif isinstance(self.dictionary, ResidualSaes) and layer < self.dictionary.layers:
                tokens = standardise(stream)
                features, difference = self._difference(layer, tokens.x)
                stream = stream + tokens.scale * (difference @ self.dictionary.decoders[layer].weight[features])
        return normalize(self.tower.head(self._directed(self.tower.layers, stream)[:, 0]), dim=-1)

    def _directed(self, place: int, stream: Tensor) -> Tensor:
        here = np.flatnonzero(self.changes.places == place)
        directions = self.directions[here]
        gains, offsets = (
            torch.from_numpy(part[here]).T for part in (self.changes.direction_gains, self.changes.direction_offsets)
        )
        return stream + (gains * (stream @ directions.T) + offsets) @ directions

    def _difference(self, layer: int, read: Tensor) -> tuple[NDArray[np.int64], Tensor]:
        """z' - z of the changed features of a layer, whose encoder reads [B, T, d]."""
        assert self.dictionary is not None
        here = np.flatnonzero(self.changes.layers == layer)
        features = self.changes.indices[here]
        if not len(here):
            return features, read.new_zeros(*read.shape[:2], 0)
        encoder = self.dictionary.encoders[layer]
        z = dense(encoder(read.flatten(0, 1), which_are_cls(read, "all")), len(encoder.weight), read)[..., features]
        return features, z * torch.from_numpy(self.changes.gains[here]).T + torch.from_numpy(
            self.changes.offsets[here]
        ).T

    def _written(
        self, clt: CrossLayerTranscoder, target: int, differences: list[tuple[NDArray[np.int64], Tensor]]
    ) -> Tensor:
        decoder = clt.decoders[target]
        written = torch.zeros(())
        for source, weight in zip(decoder.sources, decoder.weights, strict=True):
            features, difference = differences[source]
            written = written + difference @ weight[features]
        return written
