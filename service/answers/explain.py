"""From one image's decomposition and a label set to the answer: predictions, ledgers, layers, features, fidelity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account import ledger
from vitrine.models.account.heatmap import heat_map
from vitrine.models.account.ledger import Decomposition
from vitrine.models.account.scoring import SOFTMAX, Scoring
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.manifest import patch_grid
from vitrine.models.interventions.edit import NONE
from vitrine.service.answers.attention import check_attention
from vitrine.service.answers.residual import check_residual
from vitrine.service.answers.sources import check_sources
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import LabelSet
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.attribute import (
    Explain,
    Explanation,
    Feature,
    Fidelity,
    HeatMap,
    LayerAccount,
    LedgerAccount,
    LensLayer,
    Matrix,
)
from vitrine.service.schemas.classify import Prediction

if TYPE_CHECKING:
    from vitrine.models.bundle.cards import Cards


def check_explain(explain: Explain, labels: tuple[str, ...], max_targets: int, engine: Engine) -> None:
    """Raise `ServiceError` invalid_request if `explain` names an unknown label, needs what the bundle does not
    provide, or asks for too much."""
    bundle = engine.bundle
    if (explain.heatmap or explain.lens) and bundle.attention_fold is None:
        raise ServiceError(
            "invalid_request",
            f"the bundle {bundle.manifest.name!r} is from a version without heat maps and the lens; export it again",
        )
    if explain.matrix and engine.replacement is None:
        reason = "it was exported without `bundle.replacement = true` in its recipe"
        if bundle.has_replacement:
            reason = "VITRINE_REPLACEMENT=false switches it off"
        elif not bundle.manifest.has_features:
            reason = bundle.manifest.why_no_features
        raise ServiceError(
            "invalid_request", f"`explain.matrix` needs the replacement graph of {bundle.manifest.name!r}: {reason}"
        )
    check_sources(explain, bundle, enabled=engine.sources is not None)
    if explain.residual:
        check_residual("`explain.residual`", bundle, enabled=engine.residual is not None)
    if explain.attention is not None:
        check_attention(explain.attention, engine)
    if explain.targets and len(explain.targets) > max_targets:
        raise ServiceError(
            "invalid_request",
            f"there are {len(explain.targets)} targets; at most {max_targets} are explained per request",
        )
    known = set(labels)
    if unknown := [label for label in (*(explain.targets or ()), explain.contrast) if label and label not in known]:
        raise ServiceError(
            "invalid_request",
            f"targets and contrast must be labels; not among the labels: {', '.join(map(repr, unknown[:5]))}",
        )


def check_edited(explain: Explain) -> None:
    """Raise `ServiceError` invalid_request for what is computed of the network as it is, and so would explain another
    answer than the edited one."""
    asked = {name: getattr(explain, name) for name in ("heatmap", "lens", "matrix", "sources", "attention", "residual")}
    if names := [f"`explain.{name}`" for name, value in asked.items() if value]:
        raise ServiceError(
            "invalid_request",
            f"{', '.join(names)} can only explain the unmodified CLIP; set `edit` to {NONE}, or leave them out",
        )


def matrix(contributions: NDArray[np.floating]) -> Matrix:
    """One image's C [2, L, L] as a `Matrix`."""
    of_cls, of_patches = contributions.tolist()
    return Matrix(cls=of_cls, patches=of_patches)


def predict(
    parts: Decomposition, labels: LabelSet, logit_scale: float, top_k: int, scoring: Scoring = SOFTMAX
) -> list[Prediction]:
    """The first `top_k` labels, by logits or by what is above their thresholds; a softmax is over all labels."""
    values = ledger.logits(parts.embedding, labels.embeddings, logit_scale)
    shares = scoring.probabilities(values)
    order = np.argsort(-scoring.margins(values), kind="stable")[:top_k]
    cosines = values.astype(np.float64) / logit_scale
    return [
        Prediction(
            label=labels.labels[i], probability=float(shares[i]), logit=float(values[i]), cosine=float(cosines[i])
        )
        for i in order
    ]


def account(
    parts: Decomposition, labels: LabelSet, bundle: Bundle, explain: Explain, scoring: Scoring = SOFTMAX
) -> tuple[list[Explanation], Fidelity | None]:
    """One explanation per target, and the fidelity of the account; None without a CLT."""
    scale = bundle.manifest.logit_scale
    values = ledger.logits(parts.embedding, labels.embeddings, scale)
    top1 = int(scoring.margins(values).argmax())
    targets = [labels.labels.index(target) for target in explain.targets or [labels.labels[top1]]]
    explanations = [_explanation(parts, labels, bundle, explain, scoring, target) for target in targets]
    return explanations, _fidelity(parts, labels, bundle, scoring, top1)


def _explanation(
    parts: Decomposition, labels: LabelSet, bundle: Bundle, explain: Explain, scoring: Scoring, target: int
) -> Explanation:
    scale = bundle.manifest.logit_scale
    direction = labels.embeddings[target]
    if explain.contrast is not None:
        direction = direction - labels.embeddings[labels.labels.index(explain.contrast)]
    target_ledger = ledger.ledger(parts, direction, scale)
    contributions = ledger.feature_contributions(parts, bundle.directions, bundle.fold, direction, scale)
    effects = ledger.drop_effects(parts, labels.embeddings, target, bundle.beta, scale, scoring.probabilities)
    gross = target_ledger.gross
    layers = [
        LayerAccount(
            layer=layer,
            contribution=float(target_ledger.by_layer[layer]),
            share=float(abs(target_ledger.by_layer[layer]) / gross) if gross else 0.0,
            projection=None if parts.projection is None else float(parts.projection[layer]),
            drop_effect=float(effects[layer]),
            features=_features(bundle.cards, parts, layer, contributions[layer], explain.features),
        )
        for layer in range(parts.layers)
    ]
    return Explanation(
        target=labels.labels[target],
        contrast=explain.contrast,
        logit=target_ledger.logit,
        ledger=LedgerAccount(
            prior=target_ledger.prior,
            attention=target_ledger.attention.tolist(),
            clt=target_ledger.clt.tolist(),
            mlp=None if target_ledger.mlp is None else target_ledger.mlp.tolist(),
            bias=target_ledger.bias,
            error=target_ledger.error,
            edit=target_ledger.edit,
            remainder=target_ledger.remainder,
        ),
        layers=layers,
        heatmap=_heat_map(parts, bundle, direction) if explain.heatmap else None,
    )


def _heat_map(parts: Decomposition, bundle: Bundle, direction: NDArray[np.floating]) -> HeatMap:
    """The attention rows, split. `check_explain` has ensured that both tables exist."""
    assert parts.details is not None
    assert bundle.attention_fold is not None
    split = heat_map(parts, parts.details, bundle.attention_fold, direction, bundle.manifest.logit_scale)
    rows, columns = patch_grid(bundle.manifest.preprocessing, split.patches.shape[1])
    return HeatMap(
        rows=rows,
        columns=columns,
        total=split.patches.sum(0).tolist(),
        patches=split.patches.tolist(),
        heads=split.heads.tolist(),
        class_token=split.class_token.tolist(),
        constant=split.constant.tolist(),
        outliers=np.flatnonzero(split.outliers).tolist(),
    )


def lens(parts: Decomposition, labels: LabelSet, logit_scale: float) -> list[LensLayer]:
    """The prediction after each layer, for an image whose `details` were computed."""
    assert parts.details is not None
    shares = ledger.probabilities(ledger.logits(parts.details.lens, labels.embeddings, logit_scale))  # [L, N]
    entropies = -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0).sum(-1)
    return [
        LensLayer(
            layer=layer, label=labels.labels[best], probability=float(shares[layer, best]), entropy=float(entropy)
        )
        for layer, (best, entropy) in enumerate(zip(shares.argmax(-1), entropies, strict=True))
    ]


def _features(
    cards: Cards | None, parts: Decomposition, layer: int, contributions: NDArray[np.floating], count: int
) -> list[Feature]:
    """The `count` active features of a layer with the largest |contribution|, with the label from its card, if any."""
    indices, activations = parts.feature_indices[layer], parts.feature_values[layer]
    order = np.argsort(-np.abs(contributions), kind="stable")
    order = order[activations[order] != 0][:count]
    columns = (indices[order].tolist(), activations[order].tolist(), contributions[order].tolist())
    features = []
    for index, activation, contribution in zip(*columns, strict=True):
        label, score = cards.label(layer, index) if cards else (None, None)
        features.append(
            Feature(index=index, activation=activation, contribution=contribution, label=label, label_score=score)
        )
    return features


def _fidelity(parts: Decomposition, labels: LabelSet, bundle: Bundle, scoring: Scoring, top1: int) -> Fidelity | None:
    if parts.r2 is None or parts.cosine is None:  # no CLT
        return None
    scale = bundle.manifest.logit_scale
    top1_ledger = ledger.ledger(parts, labels.embeddings[top1], scale)
    gross = top1_ledger.gross
    reconstructed = parts.without(np.array([parts.error_row]), bundle.beta)[0]
    return Fidelity(
        r2=parts.r2,
        cosine=parts.cosine,
        error_share=abs(top1_ledger.error) / gross if gross else 0.0,
        reconstructed_top1_agrees=int(scoring.margins(scale * (labels.embeddings @ reconstructed)).argmax()) == top1,
    )
