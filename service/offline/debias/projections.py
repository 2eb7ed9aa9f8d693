"""Label embeddings projected off a cue's prompts (Chuang et al. 2023, arXiv 2302.00070): what an edit is compared with.

With Z [m, D] the embeddings of the cue's prompts,

    Orth-Proj   P0 = 1 - Z' (Z Z')^+ Z
    Orth-Cali   P  = P0 (1 + (lambda / |S|) sum_S (z_i - z_j)(z_i - z_j)')^-1

the closed form (their equation 5) of min |P - P0|^2 + (lambda / |S|) sum_S |P z_i - P z_j|^2, with S pairs of prompts
of one label that differ in the cue. Labels are P t, of length 1 again. In float64.
"""

from __future__ import annotations

import numpy as np

from vitrine.models.account.ledger import Array

LAMBDA = 1000.0  # theirs


def orthogonal(prompts: Array) -> Array:
    """P0 [D, D] of unit embeddings of the cue's prompts [m, D]."""
    rows = prompts.astype(np.float64)
    return np.eye(rows.shape[1]) - np.linalg.pinv(rows) @ rows


def calibrated(projection: Array, first: Array, second: Array, weight: float = LAMBDA) -> Array:
    """P [D, D] of P0 and pairs of prompts' embeddings, [S, D] each."""
    differences = first.astype(np.float64) - second.astype(np.float64)
    scatter = differences.T @ differences / len(differences)
    result: Array = projection @ np.linalg.inv(np.eye(len(projection)) + weight * scatter)
    return result


def projected(labels: Array, projection: Array) -> Array:
    """Labels [N, D] after it, of length 1; those of which nothing is left are zeros."""
    rows = labels.astype(np.float64) @ projection.T
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-9)
