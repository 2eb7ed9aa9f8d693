"""How large an answer will be, known before any work is done for it.

An answer's size is its number of values (numbers and texts), about ten bytes of JSON each. What a request asks for
multiplies: images, targets, and the details of each.
"""

from __future__ import annotations

from vitrine.models.bundle.manifest import Manifest
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.attribute import AttributeRequest

_HEAD_WIDTH = 64  # of nearly every published CLIP; the manifest does not say


def check_answer_size(values: int, limit: int, advice: str) -> None:
    """Raise `ServiceError` answer_too_large if an answer would have more than `limit` values.

    advice: what to ask for less of.
    """
    if values > limit:
        raise ServiceError(
            "answer_too_large",
            f"the answer would have about {values:,} numbers, and at most {limit:,} are allowed; {advice}",
        )


def attribution_values(manifest: Manifest, request: AttributeRequest, labels: int) -> int:
    """About how many values the answer for one image has, among `labels` labels."""
    shape = manifest.shape
    explain, layers, patches = request.explain, shape.layers, shape.tokens - 1
    per_explanation = 3 * layers + 6 + layers * (5 + 5 * min(explain.features, shape.k))  # ledger, layers, features
    if explain.heatmap:
        heads = max(1, shape.width // _HEAD_WIDTH)
        per_explanation += (layers + 1) * patches + layers * (heads + 2)
    if explain.sources:
        active = layers * min(shape.features, shape.tokens * shape.k)
        per_explanation += min(explain.source_features, active) * (shape.tokens + 7) + 6 * layers + 2 * shape.tokens
    values = 4 * min(request.top_k, labels) + (labels if request.scoring != "softmax" else 0)
    values += len(explain.targets or (None,)) * per_explanation
    if explain.lens:
        values += 4 * layers
    if (asked := explain.attention) is not None:
        active = asked.layer * min(shape.features, shape.tokens * shape.k)
        listed = min(asked.features, active)
        values += 2 * (listed * (shape.tokens + 7) + 6 * asked.layer + 2 * shape.tokens) + shape.tokens
        values += 7 * min(asked.pairs, listed * active)
    if explain.residual and (saes := manifest.residual):
        for features, k in zip(saes.features, saes.k_cls, strict=True):
            values += 3 + 4 * min(explain.features, k) + min(explain.features, features) * (shape.tokens + 3)
    if explain.matrix:
        values += 2 * layers * layers
    return values
