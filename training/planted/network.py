"""What resolving interventions has to know of a CLIP and its dictionaries, from torch modules and some images."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.replacement import which_are_cls
from vitrine.models.dictionary.residual_sae import standardise
from vitrine.models.interventions.changes import InterventionError
from vitrine.models.interventions.spec import Dictionary as Name
from vitrine.training.planted.truth import Dictionary, dense

Array = NDArray[np.floating]


class TorchNetwork:
    """`models.interventions.changes.Network`; means are over the images given."""

    def __init__(self, tower: Tower, dictionaries: dict[Name, Dictionary], images: Iterable[Tensor]) -> None:
        """images: batches of normalised pixels [B, 3, H, W]."""
        self.layers, self.tokens, self.width = tower.layers, tower.tokens, tower.width
        self.heads = int(tower.blocks[0].attn.num_heads)
        self.dictionaries = dictionaries
        self._streams, self._activations = _average(tower, dictionaries, images)

    def features(self, dictionary: Name, layer: int) -> int:
        """How many a layer has."""
        found = self.dictionaries.get(dictionary)
        return len(found.encoders[layer].weight) if found is not None and layer < found.layers else 0

    def means(self, dictionary: Name, layer: int, index: int) -> Array:
        """[2] at [CLS] and over patches."""
        return self._activations[dictionary][layer][:, index].numpy()

    def direction(self, dictionary: Name, layer: int, index: int, kind: str) -> Array:
        """[d]. What a CLT's feature writes is the sum over its targets."""
        found = self.dictionaries[dictionary]
        if kind == "encoder":
            row = found.encoders[layer].weight[index]
        elif isinstance(found, CrossLayerTranscoder):
            row = found.directions()[layer, index]
        else:
            row = found.decoders[layer].weight[index]
        array: Array = row.detach().numpy()
        return array

    def mean_stream(self, at: int) -> Array:
        """[2, d] before block `at` at [CLS] and over patches."""
        if not 0 <= at <= self.layers:
            raise InterventionError(f"there are blocks 0 to {self.layers - 1}, not {at}")
        return self._streams[at].numpy()


@torch.no_grad()
def _average(
    tower: Tower, dictionaries: dict[Name, Dictionary], images: Iterable[Tensor]
) -> tuple[list[Tensor], dict[Name, list[Tensor]]]:
    """The stream [2, d] before each block and after the last; activations [2, F] by dictionary and layer."""
    streams = [torch.zeros(2, tower.width) for _ in range(tower.layers + 1)]
    found: dict[Name, list[Tensor]] = {
        name: [torch.zeros(2, len(encoder.weight)) for encoder in dictionary.encoders]
        for name, dictionary in dictionaries.items()
    }
    count = 0
    for pixels in images:
        count += len(pixels)
        stream = tower.embed(pixels)
        streams[0] += _by_type(stream)
        for layer in range(tower.layers):
            stream = stream + tower.attention(layer, stream)
            mlp_in, mlp_out = tower.mlp(layer, stream)
            stream = stream + mlp_out
            streams[layer + 1] += _by_type(stream)
            for name, dictionary in dictionaries.items():
                if layer < dictionary.layers:
                    read = mlp_in if isinstance(dictionary, CrossLayerTranscoder) else standardise(stream).x
                    code = dictionary.encoders[layer](read.flatten(0, 1), which_are_cls(read, "all"))
                    found[name][layer] += _by_type(dense(code, len(dictionary.encoders[layer].weight), read))
    return [total / count for total in streams], {
        name: [total / count for total in totals] for name, totals in found.items()
    }


def _by_type(values: Tensor) -> Tensor:
    """Sums over images of values [B, T, n] at [CLS], and of their means over patches: [2, n]."""
    return torch.stack([values[:, 0].sum(0), values[:, 1:].mean(1).sum(0)])
