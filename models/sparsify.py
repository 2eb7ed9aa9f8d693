"""From pre-activations to a sparse code.

A code keeps, per token, a fixed number of (feature, activation) pairs, so that everything after it, in training
(`CrossLayerTranscoder.decode`) and in the served graph, costs k rows a token and not F.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Code(NamedTuple):
    """A sparse code: at most k active features a token. Unused places have activation 0."""

    indices: Tensor  # [..., k] int64, feature
    values: Tensor  # [..., k] activation z


def relu_topk(preactivations: Tensor, k: int) -> Code:
    """ReLU-Top-k: the k largest pre-activations [..., F], those below zero set to 0 (arXiv 2604.13304)."""
    values, indices = preactivations.topk(k, dim=-1, sorted=False)
    return Code(indices, values.relu())
