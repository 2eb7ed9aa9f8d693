"""Features of residual SAEs: what may be asked, and the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.residual import ResidualTrace
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import Dictionary
from vitrine.models.bundle.manifest import patch_grid
from vitrine.service.engine.engine import Engine
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.residual import (
    ResidualFeature,
    ResidualFeatures,
    ResidualLayer,
    ResidualPatchFeature,
)

if TYPE_CHECKING:
    from vitrine.models.bundle.cards import Cards


def circuit_dictionaries(engine: Engine) -> list[Dictionary]:
    """By whose features circuits can be had; empty: there are none."""
    by_clt = engine.sources if engine.bundle.manifest.has_features else None
    graphs: dict[Dictionary, Any] = {"clt": by_clt, "residual": engine.residual}
    return [dictionary for dictionary, loaded in graphs.items() if loaded is not None]


def check_residual(asked: str, bundle: Bundle, *, enabled: bool) -> None:
    """Raise `ServiceError` invalid_request if this bundle has no residual SAEs. asked: what needs them.

    enabled: VITRINE_RESIDUAL.
    """
    if not (bundle.has_residual and enabled):
        reason = "it was exported without them; `vitrine export --residual` adds them"
        if bundle.has_residual:
            reason = "VITRINE_RESIDUAL=false switches them off"
        raise ServiceError(
            "invalid_request", f"{asked} needs residual SAEs in the bundle {bundle.manifest.name!r}: {reason}"
        )


def residual_features(bundle: Bundle, trace: ResidualTrace, count: int) -> ResidualFeatures:
    """The `count` features of each layer that are most active at [CLS], and those that are at patches."""
    assert trace.indices is not None
    assert trace.values is not None
    rows, columns = patch_grid(bundle.manifest.preprocessing, trace.values.shape[1] - 1)
    codes = enumerate(zip(trace.indices, trace.values, strict=True))
    cards = bundle.residual_cards
    layers = [_layer(cards, layer, indices, values, count) for layer, (indices, values) in codes]
    return ResidualFeatures(layers=layers, rows=rows, columns=columns)


def _layer(
    cards: Cards | None, layer: int, indices: NDArray[np.integer], values: NDArray[np.floating], count: int
) -> ResidualLayer:
    """indices, values [T, k] of one layer."""
    of_cls, at_cls = _largest(indices[:1], values[:1])
    of_patches, at_patches = _largest(indices[1:], values[1:])
    return ResidualLayer(
        layer=layer,
        active_cls=len(of_cls),
        active_patches=len(of_patches),
        cls=[
            ResidualFeature(index=index, activation=activation, **_label(cards, layer, index))
            for index, activation in zip(of_cls[:count].tolist(), at_cls[:count].tolist(), strict=True)
        ],
        patches=[
            ResidualPatchFeature(
                index=index,
                activation=activation,
                **_label(cards, layer, index),
                tokens=np.where(indices[1:] == index, values[1:], 0).sum(-1).tolist(),
            )
            for index, activation in zip(of_patches[:count].tolist(), at_patches[:count].tolist(), strict=True)
        ],
    )


def _label(cards: Cards | None, layer: int, index: int) -> dict[str, Any]:
    """The fields that come from a feature's card, if there is one."""
    return dict(zip(("label", "label_score"), cards.label(layer, index), strict=True)) if cards else {}


def _largest(
    indices: NDArray[np.integer], values: NDArray[np.floating]
) -> tuple[NDArray[np.integer], NDArray[np.floating]]:
    """The features that are active at some tokens [t, k], each with its largest activation, the largest first."""
    order = np.argsort(-np.abs(values.ravel()), kind="stable")
    order = order[values.ravel()[order] != 0]
    found, first = np.unique(indices.ravel()[order], return_index=True)
    by_size = np.argsort(first)
    return found[by_size], values.ravel()[order][first[by_size]]
