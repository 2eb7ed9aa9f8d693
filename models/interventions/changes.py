"""What interventions come to, as arrays: every change is affine, so that one graph makes them all. numpy only.

    a feature     z' = z + gain * z + offset         by token; ablate: gain -1; scale: value - 1; set: -1 and the value
    a row, head   what it writes, times a factor
    a direction   x' = x + (gain * <x, u> + offset) u        of the stream, before a block or after the last

Directions that are taken out at the same token form an orthonormal basis, since taken out one after another those that
are not orthogonal would leave something of each other. A projection holds after the feature's own layer and after every
later one.

L layers, T tokens ([CLS] first), H heads, F features, d width; n features, m directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vitrine.models.errors import VitrineError
from vitrine.models.interventions.spec import Dictionary, Intervention, Mode

Array = NDArray[np.floating]
PARALLEL = 1e-6  # of a direction's length: what is left of it beside others, below which it adds nothing


class InterventionError(VitrineError, ValueError):
    """These interventions cannot be made in this bundle; the message says which and why."""


class Network(Protocol):
    """What has to be known of a bundle."""

    layers: int
    tokens: int
    heads: int
    width: int

    def features(self, dictionary: Dictionary, layer: int) -> int:
        """How many features a layer of a dictionary has; 0: it has no such layer."""

    def means(self, dictionary: Dictionary, layer: int, index: int) -> Array:
        """[2] mean activation at [CLS] and over patches. Raises `InterventionError` if the bundle has none."""

    def direction(self, dictionary: Dictionary, layer: int, index: int, kind: str) -> Array:
        """[d] in the stream, of any length, what a feature writes (decoder) or reads (encoder)."""

    def mean_stream(self, at: int) -> Array:
        """[2, d] the average picture's stream before block `at` (L: after the last) at [CLS] and over patches. Raises
        `InterventionError` if the bundle has none."""


@dataclass(frozen=True)
class Changes:
    """All changes of one image. Where nothing changes gains and offsets are 0, factors 1."""

    dictionary: Dictionary  # whose features
    layers: NDArray[np.int64]  # [n] of features
    indices: NDArray[np.int64]  # [n]
    gains: Array  # [n, T]
    offsets: Array  # [n, T]
    places: NDArray[np.int64]  # [m] before which block a direction is taken out; L: after the last
    directions: Array  # [m, d] of length 1
    direction_gains: Array  # [m, T]
    direction_offsets: Array  # [m, T]
    heads: Array  # [L, H, T] factors
    attention: Array  # [L, T] factors
    mlp: Array  # [L, T] factors
    clt: Array  # [L] factor of the CLT's row, in direct mode alone
    prior: float = 1.0  # factors, in direct mode alone
    bias: float = 1.0
    error: float = 1.0

    @property
    def nothing(self) -> bool:
        """Whether nothing is changed."""
        factors = (self.heads, self.attention, self.mlp, self.clt, self.prior, self.bias, self.error)
        additions = (self.gains, self.offsets, self.direction_gains, self.direction_offsets)
        return all(np.all(part == 1) for part in factors) and not any(np.any(part) for part in additions)


def resolve(interventions: Sequence[Intervention], network: Network, mode: Mode) -> Changes:
    """Raises `InterventionError` for what this bundle has not, for what the mode cannot do, and for the same thing
    changed twice at one token."""
    drafts = _Draft(network, mode)
    for number, item in enumerate(interventions):
        drafts.add(item, f"intervention {number}")
    return drafts.changes()


class _Draft:
    """Changes, one intervention after another."""

    def __init__(self, network: Network, mode: Mode) -> None:
        self.network, self.mode, self.tokens = network, mode, network.tokens
        layers, tokens = network.layers, network.tokens
        self.types = np.minimum(np.arange(tokens), 1)  # 0: [CLS], 1: patches
        self.heads = np.ones((layers, network.heads, tokens), np.float32)
        self.by_token: dict[str, Array] = {row: np.ones((layers, tokens), np.float32) for row in ("attention", "mlp")}
        self.clt = np.ones(layers, np.float32)
        self.others = {"prior": 1.0, "bias": 1.0, "error": 1.0}
        self.features: dict[tuple[int, int], tuple[Array, Array]] = {}  # (layer, index): gain, offset [T]
        self.projections: list[tuple[Intervention, NDArray[np.bool_]]] = []
        self.dictionary: Dictionary | None = None
        self.changed: dict[tuple[object, ...], NDArray[np.bool_]] = {}  # at which tokens

    def add(self, item: Intervention, name: str) -> None:
        """name: of the intervention, for errors."""
        at = self._tokens(item, name)
        layers = self.network.layers
        if item.layer is not None and item.layer >= layers:
            raise InterventionError(f"{name}: there is no layer {item.layer}, only layers 0 to {layers - 1}")
        if self.mode == "direct" and not (at[0] and at.sum() == 1) and item.tokens is not None:
            raise InterventionError(
                f"{name}: `mode: direct` changes only [CLS] (`tokens: cls`); `mode: rerun` can change all tokens"
            )
        factor = 0.0 if item.value is None else item.value
        if item.index is not None:
            self._feature(item, at, factor, name)
        elif item.vector is not None:
            self._vector(item, at, name)
        elif item.head is not None:
            self._claim(("head", item.layer, item.head), at, name)
            if item.head >= self.network.heads:
                raise InterventionError(
                    f"{name}: there is no head {item.head}, only heads 0 to {self.network.heads - 1}"
                )
            self.heads[item.layer, item.head, at] = factor
        elif item.row in ("attention", "mlp"):
            self._claim((item.row, item.layer), at, name)
            self.by_token[item.row][item.layer, at] = factor
        elif item.row == "clt":
            self._row_of_features(item, at, factor, name)
        else:
            self._row_of_none(item, at, factor, name)

    def changes(self) -> Changes:
        keys = np.array(list(self.features), np.int64).reshape(-1, 2)
        gains = np.array([gain for gain, _ in self.features.values()], np.float32).reshape(-1, self.tokens)
        offsets = np.array([offset for _, offset in self.features.values()], np.float32).reshape(-1, self.tokens)
        places, directions, direction_gains, direction_offsets = _bases(self.projections, self.network, self.types)
        return Changes(
            dictionary=self.dictionary or "clt",
            layers=keys[:, 0],
            indices=keys[:, 1],
            gains=gains,
            offsets=offsets,
            places=places,
            directions=directions,
            direction_gains=direction_gains,
            direction_offsets=direction_offsets,
            heads=self.heads,
            attention=self.by_token["attention"],
            mlp=self.by_token["mlp"],
            clt=self.clt,
            prior=self.others["prior"],
            bias=self.others["bias"],
            error=self.others["error"],
        )

    def _tokens(self, item: Intervention, name: str) -> NDArray[np.bool_]:
        """[T] where."""
        at = np.zeros(self.tokens, bool)
        where = item.where
        if isinstance(where, str):
            at[{"all": slice(None), "cls": slice(1), "patches": slice(1, None)}[where]] = True
        elif max(where) >= self.tokens:
            raise InterventionError(f"{name}: there is no token {max(where)}, only tokens 0 to {self.tokens - 1}")
        else:
            at[list(where)] = True
        return at

    def _claim(self, what: tuple[object, ...], at: NDArray[np.bool_], name: str) -> None:
        """Raise `InterventionError` if this is changed already at one of these tokens."""
        before = self.changed.get(what)
        if before is not None and (twice := np.flatnonzero(before & at)).size:
            raise InterventionError(f"{name} changes the same as an earlier one, at token {twice[0]}; keep one of them")
        self.changed[what] = at if before is None else before | at

    def _feature(self, item: Intervention, at: NDArray[np.bool_], factor: float, name: str) -> None:
        assert item.layer is not None
        assert item.index is not None
        if self.dictionary not in (None, item.dictionary):
            raise InterventionError(f"{name}: features of the CLT and of residual SAEs cannot be changed together")
        if self.mode == "direct" and item.dictionary == "residual":
            raise InterventionError(f"{name}: features of residual SAEs can be changed only in `mode: rerun`")
        count = self.network.features(item.dictionary, item.layer)
        if not count and item.dictionary == "clt":
            raise self._no_features(name)
        self.dictionary = item.dictionary
        if item.index >= count:
            has = f"features 0 to {count - 1}" if count else "no features"
            raise InterventionError(f"{name}: layer {item.layer} of {item.dictionary} has {has}, not {item.index}")
        self._claim(("feature", item.layer, item.index), at, name)
        if item.op == "project":
            self.projections.append((item, at))
            return
        gain, offset = self._of_feature(item.layer, item.index)
        gain[at] = factor - 1 if item.op == "scale" else -1
        if item.op == "set":
            offset[at] = factor
        elif item.to == "mean":
            offset[at] = self.network.means(item.dictionary, item.layer, item.index)[self.types[at]]

    def _vector(self, item: Intervention, at: NDArray[np.bool_], name: str) -> None:
        assert item.vector is not None
        if len(item.vector) != self.network.width:
            raise InterventionError(
                f"{name}: the stream has {self.network.width} components, but the vector has {len(item.vector)}"
            )
        self.projections.append((item, at))

    def _row_of_features(self, item: Intervention, at: NDArray[np.bool_], factor: float, name: str) -> None:
        """A row of the CLT is all features of a layer."""
        assert item.layer is not None
        if not self.network.features("clt", item.layer):
            raise self._no_features(name)
        if self.mode == "direct":
            self._claim(("clt", item.layer), at, name)
            self.clt[item.layer] = factor
            return
        if self.dictionary == "residual":
            raise InterventionError(f"{name}: features of the CLT and of residual SAEs cannot be changed together")
        self.dictionary = "clt"
        for index in range(self.network.features("clt", item.layer)):
            self._claim(("feature", item.layer, index), at, name)
            gain, _ = self._of_feature(item.layer, index)
            gain[at] = factor - 1

    def _row_of_none(self, item: Intervention, at: NDArray[np.bool_], factor: float, name: str) -> None:
        """Rows that are of no layer."""
        assert item.row is not None
        if item.row == "error" and not self.network.features("clt", 0):
            raise self._no_features(name)
        if self.mode == "rerun":
            raise InterventionError(
                f"{name}: the running network does not compute the row {item.row}; use `mode: direct` to change it"
            )
        self._claim((item.row,), at, name)
        self.others[item.row] = factor

    def _no_features(self, name: str) -> InterventionError:
        return InterventionError(
            f"{name}: this bundle has no CLT, so it has neither features nor the rows clt and error; change the rows "
            f"attention, mlp, prior and bias, or heads, or train a CLT with `vitrine train`"
        )

    def _of_feature(self, layer: int, index: int) -> tuple[Array, Array]:
        nothing = np.zeros(self.tokens, np.float32), np.zeros(self.tokens, np.float32)
        return self.features.setdefault((layer, index), nothing)


def _bases(
    projections: Sequence[tuple[Intervention, NDArray[np.bool_]]], network: Network, types: NDArray[np.integer]
) -> tuple[NDArray[np.int64], Array, Array, Array]:
    """Of what is taken out, (places, directions, gains, offsets) of `Changes`.

    At each place tokens with the same directions have an orthonormal basis of them. What is put in is the shortest
    vector whose part along each direction is what is asked for.
    """
    places: list[int] = []
    directions: list[Array] = []
    gains: list[Array] = []
    offsets: list[Array] = []
    units = [_unit(item, network) for item, _ in projections]
    for place in range(1, network.layers + 1):
        here = [number for number, (item, _) in enumerate(projections) if _holds(item, place)]
        if not here:
            continue
        masks = np.stack([projections[number][1] for number in here])  # [projections, T]
        for group in np.unique(masks[:, masks.any(0)], axis=1).T:
            at = (masks == group[:, None]).all(0)
            chosen = [number for number, used in zip(here, group, strict=True) if used]
            rows = np.stack([units[number] for number in chosen])
            basis = _orthonormal(rows)
            wanted = np.stack([_put_in(projections[number][0], units[number], place, network) for number in chosen])
            offset = basis @ np.linalg.pinv(rows, rcond=PARALLEL) @ wanted  # [r, 2] at [CLS] and at patches
            if not np.allclose(rows @ basis.T @ offset, wanted, rtol=1e-4, atol=1e-4):
                raise InterventionError(
                    "projections along the same direction at the same tokens set different values; keep one of them"
                )
            places += [place] * len(basis)
            directions.append(basis)
            gains.append(np.broadcast_to(-at.astype(np.float32), (len(basis), len(types))))
            offsets.append(offset[:, types] * at)
    if not places:
        nothing = np.zeros((0, len(types)), np.float32)
        return np.zeros(0, np.int64), np.zeros((0, network.width), np.float32), nothing, nothing
    basis, gain, offset = (np.concatenate(part).astype(np.float32) for part in (directions, gains, offsets))
    return np.array(places, np.int64), basis, gain, offset


def _holds(item: Intervention, place: int) -> bool:
    """Whether a projection is made before block `place`."""
    after = (item.layer or 0) + 1
    return place == after if item.vector is not None else place >= after


def _unit(item: Intervention, network: Network) -> Array:
    """[d] the direction of a projection, of length 1; zeros where a feature has none."""
    if item.vector is not None:
        row = np.array(item.vector, np.float64)
    else:
        row = network.direction(item.dictionary, item.layer or 0, item.index or 0, item.direction).astype(np.float64)
    length = np.linalg.norm(row)
    return row / length if length else row


def _put_in(item: Intervention, unit: Array, place: int, network: Network) -> Array:
    """[2] the stream's part along a direction after the projection, at [CLS] and at patches."""
    if item.to == "mean":
        mean: Array = network.mean_stream(place).astype(np.float64) @ unit
        return mean
    return np.full(2, item.value or 0.0)


def _orthonormal(rows: Array) -> Array:
    """A basis [r, d] of what rows [n, d], of length 1 or 0, span."""
    _, sizes, basis = np.linalg.svd(rows, full_matrices=False)
    found: Array = basis[sizes > PARALLEL]
    return found
