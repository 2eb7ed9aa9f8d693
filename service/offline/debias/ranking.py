"""Features that tell the groups apart within a class, but not the class within a group.

Of each feature, with m[y, g] its mean contribution to one label rather than another over the images of label y and
group g, in logits:

    group effect  b = mean over labels of m[y, with the cue] - m[y, without]
    label effect  a = mean over groups of m[first label, g] - m[second label, g]
    effect size   d = b / s,   s the standard deviation within the cells (label, group), pooled

A cue moves the logit in its groups whatever the label (|b| large), and does not say the label by itself (|a| small);
what the label's own features do is the other way round. Features are ranked by

    |b| (|b| / (|a| + |b|))^2

the logits that they move with the cue, the less the more they move with the label. The effect size alone would put
features first that hardly move anything, but reliably; |b| - |a| would leave out those of late layers that cue and
label share, which move most; and of |b| alone an edit costs more of the label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.models.bootstrap import Bootstrap, Estimate
from vitrine.service.offline.debias.contributions import Contributions
from vitrine.service.offline.debias.examples import Examples

SHARPNESS = 2  # 1 puts those first that carry most of a cue, 3 makes edits that cost the label least


@dataclass(frozen=True)
class Effects:
    """Of every feature [keys]; logits, but for `size`."""

    group: Array  # b
    label: Array  # a
    spread: Array  # s

    @property
    def score(self) -> Array:
        """What features are ranked by; 0: the groups do not move it."""
        group, both = np.abs(self.group), np.abs(self.group) + np.abs(self.label)
        share = np.divide(group, both, out=np.zeros_like(group), where=both > 0)
        score: Array = group * share**SHARPNESS
        return score

    @property
    def size(self) -> Array:
        """d; 0 where a feature has no spread."""
        return np.divide(self.group, self.spread, out=np.zeros_like(self.group), where=self.spread > 0)


class Contrast(NamedTuple):
    """What is compared: two labels, and one group with the others."""

    pair: tuple[int, int]  # labels
    group: int


class Place(NamedTuple):
    """A feature's place in the ranking: by the contrast in which it moves most."""

    key: int
    contrast: int  # of those that were ranked
    group: float
    label: float
    size: float


def effects(contributions: Contributions, is_first: NDArray[np.bool_], has_cue: NDArray[np.bool_]) -> Effects:
    """Of n images of two labels [n] in two groups [n]. Where a group has no images of a label, the other label alone
    tells the groups apart, and the other group alone the labels."""
    cells = 2 * is_first + has_cue
    present, means, variances = contributions.moments(cells)
    of_label, of_group = _differences(present)
    weights = np.bincount(cells, minlength=4)[present, None] / len(contributions)
    return Effects(of_label @ means, of_group @ means, np.sqrt((weights * variances).sum(0)))


def group_effect(
    values: Array, is_first: NDArray[np.bool_], has_cue: NDArray[np.bool_], bootstrap: Bootstrap
) -> Estimate:
    """b of one feature's contributions [n], and its interval."""
    present, inverse = np.unique(2 * is_first + has_cue, return_inverse=True)
    members = (inverse[:, None] == np.arange(len(present))).astype(np.float64)
    of_label, _ = _differences(present)
    drawn = bootstrap.means(members)
    whole = (drawn > 0).all(1)  # resamples without any image of a cell say nothing
    samples = bootstrap.means(values[:, None] * members)[whole] / drawn[whole]
    return bootstrap.interval(float(of_label @ (values @ members / members.sum(0))), samples @ of_label)


def _differences(present: NDArray[np.integer]) -> tuple[Array, Array]:
    """(b, a) as weights of the means of the cells that have images, 2 * first label + cue: [cells] each; zeros where
    nothing can be compared."""
    at = {cell: place for place, cell in enumerate(present.tolist())}
    both: list[Array] = []
    for pairs in (((1, 0), (3, 2)), ((2, 0), (3, 1))):
        weights, compared = np.zeros(len(present)), [pair for pair in pairs if set(pair) <= at.keys()]
        for one, other in compared:
            weights[at[one]] += 1 / len(compared)
            weights[at[other]] -= 1 / len(compared)
        both.append(weights)
    return both[0], both[1]


def rank(of_contrasts: Sequence[Effects], count: int) -> list[Place]:
    """The first `count` features by their largest score over all contrasts; none whose score is 0."""
    scores = np.stack([effects.score for effects in of_contrasts])
    contrasts, best = scores.argmax(0), scores.max(0)
    order = np.argsort(-best, kind="stable")[:count]
    places = []
    for key in order[best[order] > 0].tolist():
        found = of_contrasts[contrasts[key]]
        figures = (float(part[key]) for part in (found.group, found.label, found.size))
        places.append(Place(key, int(contrasts[key]), *figures))
    return places


def contrasts(half: Examples, logits: Array) -> list[Contrast]:
    """The pairs of labels between which a cue may decide, by each group that may have it.

    logits: [n, N] of the half's images. Each label is paired with the one that it is most mistaken for; where none is,
    with the label that has the largest mean logit beside it.
    """
    pairs, predicted = set(), logits.argmax(-1)
    for label in np.unique(half.labels).tolist():
        of_label = half.labels == label
        mistaken = np.bincount(predicted[of_label], minlength=logits.shape[1])
        mistaken[label] = 0
        beside = logits[of_label].mean(0)
        beside[label] = -np.inf
        rival = int(mistaken.argmax()) if mistaken.any() else int(beside.argmax())
        pairs.add((min(label, rival), max(label, rival)))
    groups = np.unique(half.groups).tolist()
    compared = groups[1:] if len(groups) == 2 else groups  # of two groups one says it all
    return [Contrast(pair, group) for pair in sorted(pairs) for group in compared]
