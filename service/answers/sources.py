"""Source accounts: what may be asked, and the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account import sources as source_account
from vitrine.models.account.sources import Baseline, Sources, Trace
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.manifest import patch_grid
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import LabelSet
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.attribute import Explain
from vitrine.service.schemas.sources import SourceAccount, SourceFeature, SourceLayer

if TYPE_CHECKING:
    from vitrine.models.bundle.cards import Cards


def source_baselines(engine: Engine) -> list[Literal["zero", "mean"]]:
    """What `explain.baseline` may be; empty: there are no source accounts."""
    if engine.sources is None:
        return []
    return ["zero"] if engine.bundle.baseline is None else ["zero", "mean"]


def check_sources(explain: Explain, bundle: Bundle, *, enabled: bool) -> None:
    """Raise `ServiceError` invalid_request if `explain` asks for sources that this bundle cannot give.

    enabled: VITRINE_SOURCES.
    """
    name = bundle.manifest.name
    if explain.baseline == "mean" and not explain.sources:
        raise ServiceError("invalid_request", "`explain.baseline` requires `explain.sources`; set both")
    if explain.sources and not (bundle.has_sources and enabled):
        reason = "it was exported without them (`bundle.sources`)"
        if bundle.has_sources:
            reason = "VITRINE_SOURCES=false switches them off"
        raise ServiceError("invalid_request", f"`explain.sources` needs source graphs in the bundle {name!r}: {reason}")
    if explain.baseline == "mean" and not bundle.manifest.has_features:
        why = bundle.manifest.why_no_features
        raise ServiceError("invalid_request", f"`explain.baseline` mean requires a CLT: {why}")
    if explain.baseline == "mean" and bundle.baseline is None:
        raise ServiceError("invalid_request", f"the bundle {name!r} has no average image; export it with images")


def directions(labels: LabelSet, explain: Explain, top1: int) -> NDArray[np.floating]:
    """[n, D]: of each target, less the contrast's."""
    targets = [labels.labels.index(target) for target in explain.targets] if explain.targets else [top1]
    rows = labels.embeddings[targets]
    return rows if explain.contrast is None else rows - labels.embeddings[labels.labels.index(explain.contrast)]


def source_accounts(
    bundle: Bundle, trace: Trace, outputs: dict[str, Any], of: NDArray[np.floating], explain: Explain
) -> list[SourceAccount]:
    """One account for each of the directions `of` [n, D], from `Engine.sources`' results."""
    found = source_account.accounts(trace, outputs, of, bundle.beta, bundle.manifest.logit_scale)
    if explain.baseline == "mean":
        assert bundle.baseline is not None  # see `check_sources`
        baseline = Baseline(*bundle.baseline)
        found = [
            source_account.about(sources, trace, gradients, baseline)
            for sources, gradients in zip(found, outputs["gradients"], strict=True)
        ]
    layers = bundle.manifest.shape.layers
    return [source_answer(sources, trace, bundle, explain.source_features, layers) for sources in found]


def source_answer(sources: Sources, trace: Trace, bundle: Bundle, count: int, layers: int) -> SourceAccount:
    """An account with its `count` largest features, and the first `layers` layers: later ones have no part in it."""
    by_layer = sources.features.sum((1, 2))
    errors = sources.errors.sum(1)
    rows, columns = patch_grid(bundle.manifest.preprocessing, len(sources.embeddings) - 1)
    return SourceAccount(
        logit=sources.logit,
        features=_features(sources, trace, bundle.cards, count),
        layers=[
            SourceLayer(
                layer=layer,
                features=float(by_layer[layer]),
                error=float(errors[layer]),
                bias=float(sources.biases[layer]),
                baseline=None if sources.baseline is None else float(sources.baseline[layer]),
                silent=None if sources.silent is None else float(sources.silent[layer]),
            )
            for layer in range(layers)
        ],
        embedding=sources.embeddings.tolist(),
        constants=sources.constants,
        map=sources.map.tolist(),
        rows=rows,
        columns=columns,
        error_share=sources.error_share,
        remainder=sources.remainder,
    )


def _features(sources: Sources, trace: Trace, cards: Cards | None, count: int) -> list[SourceFeature]:
    if trace.values is None:  # no CLT
        return []
    features = []
    for layer, index, contribution in zip(*(part[:count].tolist() for part in sources.by_feature()), strict=True):
        here = np.where(sources.indices[layer] == index, trace.values[layer], 0).ravel()
        label, score = cards.label(layer, index) if cards else (None, None)
        features.append(
            SourceFeature(
                layer=layer,
                index=index,
                contribution=contribution,
                activation=float(here[np.abs(here).argmax()]),
                tokens=sources.tokens_of(layer, index).tolist(),
                label=label,
                label_score=score,
            )
        )
    return features
