"""What cards describe: the features of a dictionary that codes a tower's stream, whatever its kind.

L layers that have features, F features of one of them, B images of a batch, T tokens, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vitrine.models.bundle import layout
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.clip.loading import Clip
from vitrine.models.clip.tower import Taps
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.residual_sae import ResidualSaes, standardise
from vitrine.models.dictionary.sparse_products import SortedCode
from vitrine.models.errors import VitrineError
from vitrine.models.export.residual import has_saes
from vitrine.training.checkpoint import CheckpointMeta, check_clip, load_clt, load_residual_saes, read_meta
from vitrine.training.data.activations import Activations, Residuals


class CardsBuildError(VitrineError, ValueError):
    """Cards cannot be built from these inputs; the message says why."""


class Dictionary(Protocol):
    """A CLT or residual SAEs, in evaluation mode."""

    name: layout.Dictionary
    features: tuple[int, ...]  # by layer
    places: int  # of a code at [CLS]

    def codes(self, taps: Taps) -> Iterator[SortedCode]:
        """The codes of all B * T tokens, layer by layer."""

    def directions(self) -> Iterator[Tensor]:
        """What one unit of each feature adds to a token of the stream [F, d], layer by layer."""

    def is_in(self, bundle: Bundle) -> bool:
        """Whether a bundle was exported from this very dictionary."""


class CltFeatures:
    """Features of a CLT, which read the MLPs' inputs. A direction is the sum over all layers that it writes to."""

    name: layout.Dictionary = "clt"

    def __init__(self, clt: CrossLayerTranscoder) -> None:
        self.clt, self.features, self.places = clt, (clt.features,) * clt.layers, _places(clt.encoders)

    def codes(self, taps: Taps) -> Iterator[SortedCode]:
        read = Activations.of(taps)
        for encoder, mlp_in in zip(self.clt.encoders, read.mlp_in, strict=True):
            yield encoder(mlp_in, read.is_cls)

    def directions(self) -> Iterator[Tensor]:
        yield from self.clt.directions()

    def is_in(self, bundle: Bundle) -> bool:
        stored = torch.tensor(bundle.directions)
        return torch.equal(self.clt.directions().cpu().to(stored.dtype), stored)


class SaeFeatures:
    """Features of residual SAEs, which read the stream after every block but the last, each token standardised. A
    direction is in units of the token's standard deviation there."""

    name: layout.Dictionary = "residual"

    def __init__(self, saes: ResidualSaes) -> None:
        self.saes, self.features, self.places = saes, saes.architecture.features, _places(saes.encoders)

    def codes(self, taps: Taps) -> Iterator[SortedCode]:
        read = Residuals.of(taps)
        for encoder, stream in zip(self.saes.encoders, read.stream, strict=True):
            yield encoder(standardise(stream).x, read.is_cls)

    def directions(self) -> Iterator[Tensor]:
        for decoder in self.saes.decoders:
            yield decoder.weight

    def is_in(self, bundle: Bundle) -> bool:
        return has_saes(bundle, self.saes)


def open_dictionary(checkpoint: Path, clip: Clip, bundle: Bundle) -> tuple[Dictionary, CheckpointMeta]:
    """The dictionary of a checkpoint of either kind, on the CLIP's device.

    Raises:
        CheckpointError: it cannot be read, or was trained on another CLIP.
        CardsBuildError: the bundle was not exported from it.
    """
    meta = read_meta(checkpoint)
    check_clip(checkpoint, meta, clip)
    device = next(clip.tower.parameters()).device
    dictionary: Dictionary
    if meta.recipe.kind == "clt":
        what, dictionary = "CLT", CltFeatures(load_clt(checkpoint)[0].to(device))
    else:
        what, dictionary = "residual SAEs", SaeFeatures(load_residual_saes(checkpoint)[0].to(device))
    if dictionary.name == "clt" and not bundle.manifest.has_features:
        raise CardsBuildError(f"cards describe features: {bundle.manifest.why_no_features}")
    if bundle.manifest.clip.sha256 != clip.sha256 or not dictionary.is_in(bundle):
        raise CardsBuildError(
            f"{bundle.path} was not exported from this checkpoint: the CLIP or the {what} do not match; give the "
            "bundle that was"
        )
    return dictionary, meta


def _places(encoders: Any) -> int:
    return max(int(encoder.sparsifier.inference_places()) for encoder in encoders)
