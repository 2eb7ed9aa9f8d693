"""After minus before: what interventions change in a prediction and its account."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account import ledger
from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.bundle import Bundle
from vitrine.service.answers.attribute import account_of
from vitrine.service.answers.sources import directions
from vitrine.service.engine.labels import LabelSet
from vitrine.service.schemas.attribute import AttributeRequest, Attribution, Explanation, LedgerAccount
from vitrine.service.schemas.intervene import After, Difference, ExplanationChange, FeatureChange, ProbabilityChange


class Before(NamedTuple):
    """The answer without interventions, and what it was made of."""

    answer: Attribution
    parts: Decomposition
    labels: LabelSet


def compared(
    bundle: Bundle, before: Before, parts: Decomposition, request: AttributeRequest
) -> tuple[After, Difference]:
    """What is said of changed `parts`, with the targets of `before`, and by how much it differs."""
    targets = [explanation.target for explanation in before.answer.explanations]
    asked = request.model_copy(update={"explain": request.explain.model_copy(update={"targets": targets})})
    predictions, _, explanations, _, fidelity = account_of(bundle, parts, before.labels, asked)
    after = After(predictions=predictions, explanations=explanations, fidelity=fidelity)
    of = directions(before.labels, asked.explain, 0)  # [targets, D]
    return after, Difference(
        top1_changes=predictions[0].label != before.answer.predictions[0].label,
        probabilities=_probabilities(bundle, before, parts, after),
        explanations=[
            ExplanationChange(
                target=new.target,
                contrast=new.contrast,
                logit=new.logit - old.logit,
                ledger=_ledgers(old, new),
                features=_features(bundle, before.parts, parts, direction, asked.explain.features),
            )
            for old, new, direction in zip(before.answer.explanations, explanations, of, strict=True)
        ],
    )


def _probabilities(bundle: Bundle, before: Before, parts: Decomposition, after: After) -> list[ProbabilityChange]:
    labels, scale = before.labels, bundle.manifest.logit_scale
    old, new = (
        ledger.probabilities(ledger.logits(one.embedding, labels.embeddings, scale)) for one in (before.parts, parts)
    )
    names = dict.fromkeys(prediction.label for prediction in (*before.answer.predictions, *after.predictions))
    places = [labels.labels.index(name) for name in names]
    return [
        ProbabilityChange(label=labels.labels[place], before=float(old[place]), after=float(new[place]))
        for place in places
    ]


def _ledgers(old: Explanation, new: Explanation) -> LedgerAccount:
    before, after = old.ledger, new.ledger
    return LedgerAccount(
        prior=after.prior - before.prior,
        attention=[b - a for a, b in zip(before.attention, after.attention, strict=True)],
        clt=[b - a for a, b in zip(before.clt, after.clt, strict=True)],
        mlp=_between(before.mlp, after.mlp),
        bias=after.bias - before.bias,
        error=after.error - before.error,
        edit=after.edit - before.edit,
        remainder=after.remainder - before.remainder,
    )


def _between(before: list[float] | None, after: list[float] | None) -> list[float] | None:
    if before is None or after is None:
        return None
    return [b - a for a, b in zip(before, after, strict=True)]


def _features(
    bundle: Bundle, old: Decomposition, new: Decomposition, direction: NDArray[np.floating], per_layer: int
) -> list[FeatureChange]:
    if not bundle.manifest.has_features:
        return []
    tables = []
    for parts in (old, new):
        table = np.zeros((2, parts.layers, bundle.manifest.shape.features))  # activations, contributions
        contributions = ledger.feature_contributions(
            parts, bundle.directions, bundle.fold, direction, bundle.manifest.logit_scale
        )
        at = np.arange(parts.layers)[:, None], parts.feature_indices
        np.add.at(table[0], at, parts.feature_values)
        np.add.at(table[1], at, contributions)
        tables.append(table)
    (before, old_logits), (after, new_logits) = tables
    change = new_logits - old_logits
    order = np.argsort(-np.abs(change), axis=None, kind="stable")[: per_layer * old.layers]
    features = []
    for layer, index in zip(*(part.tolist() for part in np.unravel_index(order, change.shape)), strict=True):
        if not change[layer, index]:
            break
        label, score = bundle.cards.label(layer, index) if bundle.cards else (None, None)
        features.append(
            FeatureChange(
                layer=layer,
                index=index,
                activation_before=float(before[layer, index]),
                activation_after=float(after[layer, index]),
                contribution=float(change[layer, index]),
                label=label,
                label_score=score,
            )
        )
    return features
