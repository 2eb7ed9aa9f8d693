"""What a dictionary learns from: the tokens of a CLIP's activations, of two kinds.

A kind is a class of batches: `of` takes it from the tower's taps, `tables` says how many [N, d] tables a batch has. All
tensors of a batch but `is_cls` are such tables, [tables of this name, N, d].

L layers, N tokens, d width; for whole images N = images * T, [CLS] first in each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from vitrine.models.clip.tower import Taps, Tower


class Activations(NamedTuple):
    """Inputs and outputs of every MLP: what a CLT reads and writes."""

    mlp_in: Tensor  # [L, N, d]
    mlp_out: Tensor  # [L, N, d]
    is_cls: Tensor  # [N] bool

    @classmethod
    def of(cls, taps: Taps) -> Activations:
        """Flattened over images and tokens."""
        return cls(taps.mlp_in.flatten(1, 2), taps.mlp_out.flatten(1, 2), _is_cls(taps))

    @staticmethod
    def layers(tower: Tower) -> int:
        """Layers of each tensor."""
        return tower.layers


class Residuals(NamedTuple):
    """The residual stream after every block but the last: what residual SAEs read and give back."""

    stream: Tensor  # [L - 1, N, d]
    is_cls: Tensor  # [N] bool

    @classmethod
    def of(cls, taps: Taps) -> Residuals:
        """Flattened over images and tokens."""
        return cls(residual_streams(taps).flatten(1, 2), _is_cls(taps))

    @staticmethod
    def layers(tower: Tower) -> int:
        """Layers of each tensor."""
        return tower.layers - 1


Batch = TypeVar("Batch", Activations, Residuals)


def batch_of(kind: type[Batch], tables: Iterable[Tensor], is_cls: Tensor) -> Batch:
    """A batch from its tables, in the order of its fields."""
    return kind._make([*tables, is_cls])


def residual_streams(taps: Taps) -> Tensor:
    """The stream after every block but the last [L - 1, B, T, d]."""
    return taps.residual_in + (taps.attn_out[:-1] + taps.mlp_out[:-1]).cumsum(0)


def table_names(kind: type[Activations] | type[Residuals]) -> tuple[str, ...]:
    """The tensors of a batch that have one table for each layer."""
    return kind._fields[:-1]


def tables(kind: type[Activations] | type[Residuals], tower: Tower) -> int:
    """Number of [N, d] tables in a batch."""
    return len(table_names(kind)) * kind.layers(tower)


def _is_cls(taps: Taps) -> Tensor:
    is_cls = torch.zeros(taps.residual_out.shape[:2], dtype=torch.bool, device=taps.residual_out.device)
    is_cls[:, 0] = True
    return is_cls.flatten()
