"""The first features of a ranking, with what their cards say of them, and intervals of what they give; and directions,
with the features that write along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.models.bootstrap import Bootstrap
from vitrine.models.bundle.bundle import Bundle
from vitrine.service.offline.debias.contributions import Contributions
from vitrine.service.offline.debias.directions import Direction
from vitrine.service.offline.debias.examples import Examples
from vitrine.service.offline.debias.ranking import Contrast, Place, effects, group_effect
from vitrine.service.offline.debias.report import Ranked, RankedDirection, Writer

EXEMPLARS = 3
WRITERS = 10


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


def direction_shown(
    bundle: Bundle,
    direction: Direction,
    half: Examples,
    pair: tuple[int, int],
    taken: Array,
    written: tuple[Examples, Contributions],
    seed: int,
) -> RankedDirection:
    """
    Args:
        pair: labels.
        taken: [n, N] how many logits less each of the half's images has without it.
        written: some of its images, and what each feature gives along the direction in these.
    """
    members = np.flatnonzero(np.isin(half.labels, pair))
    of_pair, margins = half.only(members), (taken[:, pair[0]] - taken[:, pair[1]])[members]
    is_first, has_cue = of_pair.labels == pair[0], of_pair.groups == direction.group
    some, given = written
    along = effects(given, some.labels == pair[0], some.groups == direction.group).group
    order = np.argsort(-np.abs(along), kind="stable")[:WRITERS]
    return RankedDirection(
        group=half.group_names[direction.group],
        pair=(half.label_names[pair[0]], half.label_names[pair[1]]),
        logits=group_effect(margins, is_first, has_cue, Bootstrap(len(of_pair), seed=seed)),
        along=direction.length,
        by_features=float(along.sum()),
        written_by=[
            Writer(layer=layer, index=index, along=float(along[key]), label=_card(bundle, layer, index)[0])
            for key, (layer, index) in ((key, divmod(key, given.features)) for key in order.tolist())
            if along[key]
        ],
    )


def _card(bundle: Bundle, layer: int, index: int) -> tuple[str | None, list[str]]:
    """(label, names of images that it fires on most)."""
    if bundle.cards is None:
        return None, []
    card = bundle.cards.card(layer, index)
    images = bundle.cards.images([exemplar.image for exemplar in card.exemplars[:EXEMPLARS]])
    return card.label, [image.name for image in images]
