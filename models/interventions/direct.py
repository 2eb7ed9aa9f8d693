"""What a prediction would be if [CLS]'s final residual were changed: `mode: direct`. numpy only.

The residual r = sum_m c_m (`models.account.ledger`) becomes r' = sum_m c'_m + c_edit, with

    c'_m      its row's factor times (c_m + what its changed features write more or less, + what its changed heads do)
    c_edit    sum_u (gain <sum_m c'_m, u> + offset) u    over the directions taken out after the last block

and everything after it is done again: ln_post, the projection to the embedding, and its norm. That is exact and costs
no inference. What later layers would have made of a change is left out; `mode: rerun` has it.

    sigma'^2 = sigma^2 + var(r') - var(r)
    z'       = ((z - beta) sigma + (r' - r) M) / sigma' + beta

A row that nothing changed is only rescaled, by sigma |z| / (sigma' |z'|); so are, with a CLT, the MLPs' rows, which are
of the network as it ran.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array, Decomposition
from vitrine.models.interventions.changes import Changes, InterventionError

SMALLEST = 1e-12  # of LayerNorm's epsilon, which is found as a difference
LEAST_LEFT = 1e-3  # of |z|; below it, its direction is that of rounding errors


class Tables(Protocol):
    """What a bundle has beside its graphs."""

    @property
    def directions(self) -> Array:
        """[L, F, d] what one unit of a feature adds to the residual."""

    @property
    def fold(self) -> Array:
        """M [d, D] of `Tower.fold`."""

    @property
    def beta(self) -> Array:
        """[D] ln_post's bias in embedding space."""


def changed(parts: Decomposition, changes: Changes, tables: Tables) -> Decomposition:
    """The decomposition after these changes, resolved for `mode: direct`; `parts` itself where they change nothing.

    It has one row more, the last: `edit`, what taking directions out wrote; an edited one has it already. Changed
    features stand in places of their own, after all others. `projection`, `r2`, `cosine` and `details` stay: they are
    of the network as it ran.

    Raises `InterventionError` for what `parts` has not got, and if nothing of the residual is left.
    """
    if changes.nothing:
        return parts
    if parts.components is None:
        raise InterventionError(
            "this bundle was exported before there were interventions, so its vision graph does not give components: "
            "export it again"
        )
    before, rows = (_with_edit(parts, table.astype(np.float64)) for table in (parts.components, parts.rows))
    factors, (written, indices, values) = _factors(parts, changes), _features(parts, changes, tables)
    written[1 : parts.clt_row(0)] += _heads(parts, changes)
    written *= factors[:, None]
    after = factors[:, None] * before + written
    edit = _directions(parts, changes, after.sum(0))
    written[-1] += edit
    after[-1] += edit
    if np.array_equal(after, before):
        return parts

    residual, difference = before.sum(0), (after - before).sum(0)
    epsilon = max(parts.sigma**2 - float(residual.var()), SMALLEST)
    residual = residual + difference
    sigma = float(np.sqrt(residual.var() + epsilon))
    beta = tables.beta.astype(np.float64)
    folded = _folded(np.concatenate([difference[None], written]), tables.fold)
    z = ((parts.embedding.astype(np.float64) * parts.norm - beta) * parts.sigma + folded[0]) / sigma + beta
    norm = float(np.linalg.norm(z))
    if norm < LEAST_LEFT * parts.norm:
        raise InterventionError("these interventions remove everything that depends on the image: change less")

    scale, constant = parts.sigma * parts.norm / (sigma * norm), np.zeros_like(rows)
    constant[parts.bias_row] = beta  # part of the bias row, but not of the residual
    rows = factors[:, None] * (rows - constant / parts.norm) * scale + folded[1:] / (sigma * norm) + constant / norm
    of_features = factors[parts.clt_row(0) : parts.bias_row, None]
    return replace(
        parts,
        embedding=(z / norm).astype(parts.embedding.dtype),
        rows=rows.astype(parts.rows.dtype),
        sigma=sigma,
        sigma_without=np.sqrt((residual - after).var(-1) + epsilon).astype(parts.sigma_without.dtype),
        norm=norm,
        feature_indices=indices,
        feature_values=(values * of_features).astype(parts.feature_values.dtype),
        components=after.astype(parts.components.dtype),
        mlp_rows=None if parts.mlp_rows is None else (parts.mlp_rows * scale).astype(parts.mlp_rows.dtype),
    )


def _folded(components: Array, fold: Array) -> Array:
    """[n, d] -> [n, D]. In the precision of M, which is by far the largest table here; rows of nothing but 0 are most,
    and stay so."""
    found = np.zeros((len(components), fold.shape[1]))
    some = components.any(-1)
    found[some] = components[some].astype(fold.dtype) @ fold
    return found


def _with_edit(parts: Decomposition, table: Array) -> Array:
    """A table with a row for each of the ledger's, and the edit's, which an earlier intervention may have made."""
    return table if len(table) > parts.error_row + 1 else np.pad(table, ((0, 1), (0, 0)))


def _factors(parts: Decomposition, changes: Changes) -> Array:
    """[R + 1] by which each row is multiplied. Raises `InterventionError` for the row of an MLP, with a CLT."""
    mlp = changes.mlp[:, 0]
    if parts.has_features and (layers := np.flatnonzero(mlp != 1).tolist()):
        raise InterventionError(
            f"the row mlp of layer {layers[0]} is not part of the ledger, which has the rows `clt` and `error` "
            f"instead: use `mode: rerun` to change it"
        )
    factors = np.ones(parts.error_row + 2)
    factors[0] = changes.prior
    factors[1 : parts.clt_row(0)] = changes.attention[:, 0]
    factors[parts.clt_row(0) : parts.bias_row] = changes.clt if parts.has_features else mlp
    factors[parts.bias_row], factors[parts.error_row] = changes.bias, changes.error
    return factors


def _features(parts: Decomposition, changes: Changes, tables: Tables) -> tuple[Array, NDArray[np.integer], Array]:
    """(what changed features write more or less, by row [R + 1, d]; indices and activations of all features [L, k + n],
    those that were changed in places of their own)."""
    written = np.zeros((parts.error_row + 2, tables.fold.shape[0]))
    indices, values = parts.feature_indices, parts.feature_values.astype(np.float64)
    places = int(np.bincount(changes.layers).max(initial=0))
    more_indices = np.zeros((parts.layers, places), indices.dtype)
    more_values, used = np.zeros((parts.layers, places)), np.zeros(parts.layers, np.int64)
    for layer, index, gain, offset in zip(
        changes.layers.tolist(), changes.indices.tolist(), changes.gains[:, 0], changes.offsets[:, 0], strict=True
    ):
        here = indices[layer] == index
        activation = float(values[layer, here].sum())
        difference = float(gain) * activation + float(offset)
        written[parts.clt_row(layer)] += difference * tables.directions[layer, index].astype(np.float64)
        values[layer, here] = 0
        more_indices[layer, used[layer]], more_values[layer, used[layer]] = index, activation + difference
        used[layer] += 1
    return written, np.concatenate([indices, more_indices], 1), np.concatenate([values, more_values], 1)


def _heads(parts: Decomposition, changes: Changes) -> Array | float:
    """What changed heads write more or less, by layer [L, d]."""
    less = changes.heads[:, :, 0].astype(np.float64) - 1  # [L, H]
    if not less.any():
        return 0.0
    if parts.details is None or parts.details.head_components is None:
        raise InterventionError(
            "this bundle was exported before there were interventions on heads, so its vision graph does not give "
            "what each head writes: export it again"
        )
    of_heads: Array = np.einsum("lh,lhd->ld", less, parts.details.head_components.astype(np.float64))
    return of_heads


def _directions(parts: Decomposition, changes: Changes, residual: Array) -> Array:
    """[d] what taking directions out of the final residual adds to it."""
    last = changes.places == parts.layers
    basis = changes.directions[last].astype(np.float64)
    along = changes.direction_gains[last, 0] * (basis @ residual) + changes.direction_offsets[last, 0]
    taken: Array = along @ basis
    return taken
