"""What resolving interventions has to know of a CLIP and its dictionaries, from torch modules and some images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.average import mean_code, mean_residual_code, mean_stream
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.interventions.spec import Dictionary as Name
from vitrine.training.planted.truth import Dictionary

Array = NDArray[np.floating]


class TorchNetwork:
    """`models.interventions.changes.Network`; means are over the images given."""

    def __init__(self, tower: Tower, dictionaries: Mapping[Name, Dictionary], images: Sequence[Tensor]) -> None:
        """images: batches of normalised pixels [B, 3, H, W]."""
        self.layers, self.tokens, self.width = tower.layers, tower.tokens, tower.width
        self.heads = int(tower.blocks[0].attn.num_heads)
        self.dictionaries, self._stream = dictionaries, mean_stream(tower, images)
        self._means, self._written = dict[Name, Tensor](), dict[Name, Sequence[Tensor]]()
        for name, found in dictionaries.items():
            if isinstance(found, CrossLayerTranscoder):  # what a feature writes is the sum over its targets
                self._means[name], self._written[name] = mean_code(tower, found, images), list(found.directions())
            else:
                self._means[name] = mean_residual_code(tower, found, images)
                self._written[name] = [decoder.weight.detach() for decoder in found.decoders]

    def features(self, dictionary: Name, layer: int) -> int:
        """How many a layer has."""
        written = self._written.get(dictionary, ())
        return len(written[layer]) if layer < len(written) else 0

    def means(self, dictionary: Name, layer: int, index: int) -> Array:
        """[2] at [CLS] and over patches."""
        return self._means[dictionary][layer, :, index].numpy()

    def direction(self, dictionary: Name, layer: int, index: int, kind: str) -> Array:
        """[d]."""
        encoders = self.dictionaries[dictionary].encoders
        row = encoders[layer].weight.detach()[index] if kind == "encoder" else self._written[dictionary][layer][index]
        array: Array = row.numpy()
        return array

    def mean_stream(self, at: int) -> Array:
        """[2, d] before block `at` (L: after the last) at [CLS] and over patches."""
        return self._stream[at].numpy()
