"""How a request's labels are compared, and whether any of them fits the image."""

from __future__ import annotations

import numpy as np

from vitrine.models.account import ledger
from vitrine.models.account.ledger import Decomposition
from vitrine.models.account.scoring import SOFTMAX, Independent, Scoring
from vitrine.service.engine.labels import LabelSet
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.classify import ClassifyRequest, Forced, Verdict

_NAMED = 5  # labels in a message


def scoring_of(request: ClassifyRequest, labels: tuple[str, ...], logit_scale: float) -> Scoring:
    """The request's scoring. Raises `ServiceError` if its thresholds are not those of its labels."""
    threshold = request.threshold
    if request.scoring == "softmax":
        return SOFTMAX
    if isinstance(threshold, dict):
        if missing := [label for label in labels if label not in threshold]:
            raise _invalid("`threshold` is missing for ", missing)
        if len(threshold) > len(labels):
            known = set(labels)
            raise _invalid(
                "`threshold` has keys that are not among the labels: ", [it for it in threshold if it not in known]
            )
        thresholds = np.array([threshold[label] for label in labels])
    else:
        thresholds = np.full(len(labels), threshold)
    return Independent(thresholds, logit_scale)


def verdict(parts: Decomposition, labels: LabelSet, logit_scale: float, scoring: Scoring) -> Verdict | None:
    """Which labels reach their threshold, if they have one; and which the softmax would have named all the same."""
    if scoring is SOFTMAX:
        return None
    values = ledger.logits(parts.embedding, labels.embeddings, logit_scale)
    margins, shares = scoring.margins(values), ledger.probabilities(values)
    above = [labels.labels[place] for place in np.argsort(-margins, kind="stable") if margins[place] >= 0]
    first = int(values.argmax())
    forced = Forced(label=labels.labels[first], probability=float(shares[first]))
    return Verdict(above=above, none_of_these=not above, softmax=forced)


def _invalid(problem: str, labels: list[str]) -> ServiceError:
    more = f" and {len(labels) - _NAMED:,} more" if len(labels) > _NAMED else ""
    return ServiceError("invalid_request", problem + ", ".join(repr(label[:100]) for label in labels[:_NAMED]) + more)
