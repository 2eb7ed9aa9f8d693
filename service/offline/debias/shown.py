"""The first features of a ranking, with what their cards say of them, and intervals of what they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vitrine.models.bootstrap import Bootstrap
from vitrine.models.bundle.bundle import Bundle
from vitrine.service.offline.debias.contributions import Contributions
from vitrine.service.offline.debias.examples import Examples
from vitrine.service.offline.debias.ranking import Contrast, Place, group_effect
from vitrine.service.offline.debias.report import Ranked

EXEMPLARS = 3


def shown(
    bundle: Bundle,
    ranking: Sequence[Place],
    half: Examples,
    compared: Sequence[Contrast],
    given: Mapping[tuple[int, int], tuple[NDArray[np.int64], Contributions]],
    seed: int,
) -> list[Ranked]:
    """given: of each pair of labels the half's images that are of it, and their contributions."""
    found = []
    for place in ranking:
        contrast = compared[place.contrast]
        (first, second), (members, of_images) = contrast.pair, given[contrast.pair]
        some, values = half.only(members), of_images.dense(np.array([place.key]))[:, 0]
        bootstrap = Bootstrap(len(some), seed=seed)
        layer, index = divmod(place.key, of_images.features)
        label, exemplars = _card(bundle, layer, index)
        found.append(
            Ranked(
                layer=layer,
                index=index,
                pair=(half.label_names[first], half.label_names[second]),
                group=half.group_names[contrast.group],
                logits=group_effect(values, some.labels == first, some.groups == contrast.group, bootstrap),
                label_logits=place.label,
                size=place.size,
                label=label,
                exemplars=exemplars,
            )
        )
    return found


def _card(bundle: Bundle, layer: int, index: int) -> tuple[str | None, list[str]]:
    """(label, names of images that it fires on most)."""
    if bundle.cards is None:
        return None, []
    card = bundle.cards.card(layer, index)
    images = bundle.cards.images([exemplar.image for exemplar in card.exemplars[:EXEMPLARS]])
    return card.label, [image.name for image in images]
