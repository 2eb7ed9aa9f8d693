"""A decomposition with changes at [CLS]'s final residual: exact, and without what later layers would make of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from vitrine.models.account.ledger import Array, Decomposition
from vitrine.models.interventions.changes import Changes, InterventionError


class Tables(Protocol):
    """What it takes of a bundle."""

    @property
    def directions(self) -> Array: ...  # [L, F, d]

    @property
    def fold(self) -> Array: ...  # [d, D]

    @property
    def beta(self) -> Array: ...  # [D]


def changed(parts: Decomposition, changes: Changes, tables: Tables) -> Decomposition:
    """The decomposition of the residual with these changes. Raises `InterventionError` for what is left out here."""
    if len(changes.places) or np.any(changes.heads != 1) or np.any(changes.mlp != 1):
        raise InterventionError("only features and the rows prior, attention, clt, bias and error are changed here")
    if parts.components is None:
        raise InterventionError("the vision graph gives no components; export the bundle again")
    components, values, layers = parts.components.astype(np.float64), parts.feature_values.copy(), parts.layers
    for layer, index, gain, offset in zip(
        changes.layers, changes.indices, changes.gains[:, 0], changes.offsets[:, 0], strict=True
    ):
        at = parts.feature_indices[layer] == index
        difference = float(gain * values[layer][at].sum() + offset)
        components[parts.clt_row(layer)] += difference * tables.directions[layer, index]
        values[layer][at] += difference
    components[0] *= changes.prior
    components[1 : 1 + layers] *= changes.attention[:, :1]
    components[1 + layers : 1 + 2 * layers] *= changes.clt[:, None]
    components[parts.bias_row] *= changes.bias
    components[parts.error_row] *= changes.error
    before, after = parts.components.sum(0, dtype=np.float64), components.sum(0)
    variance = parts.sigma**2 - before.var()  # what ln_post adds
    sigma = float(np.sqrt(variance + after.var()))
    rows = components @ tables.fold.astype(np.float64) / sigma
    rows[parts.bias_row] += tables.beta
    embedding = rows.sum(0)
    norm = float(np.linalg.norm(embedding))
    return replace(
        parts,
        embedding=(embedding / norm).astype(np.float32),
        rows=(rows / norm).astype(np.float32),
        sigma=sigma,
        sigma_without=np.sqrt(variance + (after - components).var(1)).astype(np.float32),
        norm=norm,
        feature_values=values,
        components=components.astype(np.float32),
    )
