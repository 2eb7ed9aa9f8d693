"""The projection score C_{i->j}: what part of a target layer's output each source layer writes (arXiv 2604.13304).

With c_i what source layer i writes to a target at one token, and y = sum_i c_i (no bias),

    C_i = <c_i, y> / |y|^2                so that sum_i C_i = 1

The score does not change if all c_i are scaled, however small they are. A token where y is 0, or is lost in the
rounding of parts that cancel, has no score: all C_i are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANCELLED = 2.0**-12  # a sum so much smaller than one of its parts is mostly float32 rounding


def projection_scores(parts: Tensor, dim: int) -> Tensor:
    """C_i for parts c_i along `dim` (counted from the front), [..., d] -> [...]: along `dim` they sum to 1, or are 0.

    y is taken relative to its largest element, and C_i relative to the sum of all, so that nothing underflows. In
    exported graphs this runs as ONNX operators.
    """
    total = parts.sum(dim, keepdim=True)
    direction = total / total.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(parts.dtype).tiny)
    along = (parts * direction).sum(-1)  # <c_i, y> / max |y|
    whole = along.sum(dim, keepdim=True)  # |y|^2 / max |y|
    lost = whole <= along.abs().amax(dim, keepdim=True) * CANCELLED  # false for nan, which stays nan
    return along / whole.masked_fill(lost, torch.inf)
