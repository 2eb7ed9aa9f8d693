"""The vision graph of a bundle, in torch again: for graphs that are added to it when its CLT is no longer at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.external_data_helper import load_external_data_for_tensor
from torch import Tensor, nn

from vitrine.models.bundle.layout import ENCODERS
from vitrine.models.bundle.manifest import Manifest
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import Architecture
from vitrine.models.dictionary.encoder import Encoder
from vitrine.models.dictionary.sparsify import BatchTopK, JumpReLU, make_sparsifier
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.vision import VisionGraph


def vision_of(folder: Path, manifest: Manifest, tower: Tower) -> VisionGraph:
    """The vision graph of a bundle with a table of encoders, or without a CLT, and that tower's."""
    if not manifest.has_features:
        return VisionGraph(tower).eval()
    clt: Any = ServedClt(folder, manifest)
    nothing = torch.zeros(tower.layers, tower.width)
    graph = AttributionGraph(tower, clt, nothing, getattr(torch, manifest.tables)).eval()
    graph.cls_mean.copy_(clt.tensors["cls_mean"])
    return graph


class ServedClt:
    """What `AttributionGraph` reads of a CLT, from a bundle's folder."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        shape = manifest.shape
        self.layers, self.width, self.features = shape.layers, shape.width, shape.features
        k, k_cls = (budgets or (shape.k,) * shape.layers for budgets in (shape.k_patches, shape.k_cls))
        assert manifest.sparsifier is not None  # there is a table of encoders
        self.architecture = Architecture(
            self.layers, self.width, self.features, k, k_cls, manifest.sparsifier, shape.cross_layer
        )
        # Of the biases there is a table too, but what is looked up in a small one is not there by its name.
        biases = tuple(f"encoders.{layer}.bias" for layer in range(self.layers))
        self.tensors = _tensors(folder / "vision.onnx", (*biases, "threshold", "bias", "cls_mean"))
        rows = _table(folder / ENCODERS)
        self.encoders = [self._encoder(layer, rows[layer]) for layer in range(self.layers)]
        self._directions = _table(folder / "directions.npy")
        earlier = self.layers - 1 if shape.cross_layer else 0
        self._last = _table(folder / "last_decoders.npy").view(earlier, self.features, -1) if earlier else None

    def directions(self) -> Tensor:
        """[L, F, d]."""
        return self._directions

    def writers(self, target: int) -> Tensor:
        """[L, F, d] for the last target: the decoders of all layers before it."""
        nothing = torch.zeros(1, self.features, self.width)
        return nothing if self._last is None else torch.cat([self._last, nothing])

    def decoder_biases(self) -> Tensor:
        """[1, d]: their sum."""
        return self.tensors["bias"][None]

    def _encoder(self, layer: int, rows: Tensor) -> Encoder:
        kind, budgets = self.architecture.sparsifier, (self.architecture.k[layer], self.architecture.k_cls[layer])
        sparsifier = make_sparsifier(kind, self.features, *budgets)
        if isinstance(sparsifier, JumpReLU):
            sparsifier.log_threshold = nn.Parameter(self.tensors["threshold"][layer].log(), requires_grad=False)
        elif isinstance(sparsifier, BatchTopK):
            sparsifier.thresholds.fill_(float(self.tensors["threshold"][layer, 0]))
        encoder = Encoder(self.width, sparsifier)
        encoder.weight = nn.Parameter(rows, requires_grad=False)
        encoder.bias = nn.Parameter(self.tensors[f"encoders.{layer}.bias"], requires_grad=False)
        return encoder


def _table(file: Path) -> Tensor:
    """A .npy table in float32, which holds its values exactly."""
    return torch.from_numpy(np.load(file).astype(np.float32))


def _tensors(file: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Those of these tensors that a graph has, in float32, by name; some are stored in half precision."""
    found = {}
    for tensor in onnx.load(file, load_external_data=False).graph.initializer:
        if (name := tensor.name.removesuffix(".half")) in names:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                load_external_data_for_tensor(tensor, str(file.parent))
            found[name] = torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype(np.float32))
    return found
