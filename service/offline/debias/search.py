"""The edit that is proposed: of many tried on the finding half, the one with the best worst group.

Of those that lose at most `cap` of the average accuracy. Every op with every number of features, and the groups'
directions, are tried on a few images of every cell; a quarter goes on to more, and a quarter of these to all
(successive halving; Jamieson and Talwalkar 2016). Then the best at [CLS] and at the patches alone, and the best only
where it moves the lead of the first label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.models.groups import by_cell
from vitrine.models.interventions.changes import InterventionError
from vitrine.models.interventions.conditions import applied, moved
from vitrine.models.interventions.edit import Condition
from vitrine.models.interventions.spec import Mode, Tokens
from vitrine.service.offline.debias.candidates import DIRECTION, EDITS, OPS, Candidate

COUNTS = (1, 4, 16, 64, 256)
IMAGES = (32, 128)  # of the rounds before the last, which has all
KEPT = 4  # one in so many candidates goes on to the next round
SHIFTS = (0.0, -0.1, 0.1, -0.2, 0.2)  # of directions: what the middle is for the means need not be for the decision
QUANTILES = (0.25, 0.5, 0.75)  # of how far the lead is moved: conditions that are tried


@dataclass(frozen=True)
class Half:
    """The finding half's n images."""

    labels: NDArray[np.int64]  # [n]
    cells: NDArray[np.int64]  # [n]
    logits: Array  # [n, N] without an edit

    def __len__(self) -> int:
        return len(self.labels)

    def rounds(self) -> list[NDArray[np.int64]]:
        """Images of each round: of every cell as many, as far as it has them; all in the last."""
        generator, places = np.random.default_rng(0), np.zeros(len(self), np.int64)
        for cell in np.unique(self.cells):
            members = generator.permutation(np.flatnonzero(self.cells == cell))
            places[members] = np.arange(len(members))
        order = np.argsort(places, kind="stable")
        return [np.sort(order[:size]) for size in IMAGES if size < len(self)] + [np.arange(len(self))]


@dataclass(frozen=True)
class Trial:
    """A candidate's accuracies on so many images of the finding half."""

    candidate: Candidate
    worst: float
    average: float
    images: int


@dataclass(frozen=True)
class Search:
    trials: list[Trial]  # of the last round
    tried: list[int]  # how many candidates each round had
    refused: dict[str, str]  # of an op and mode that this bundle cannot do, why
    best: Trial | None  # None: none was better than no edit, within the cap


def conditioned(before: Array, after: Array, condition: Condition | None) -> Array:
    """Logits [n, N] under an edit with this condition."""
    return after if condition is None else np.where(applied(condition, before, after)[:, None], after, before)


def candidates(modes: Sequence[Mode], features: int, directions: int, ops: Sequence[str] = EDITS) -> list[Candidate]:
    """All that are tried first: each op of `ops`."""
    counts = [count for count in COUNTS if count < features] + [min(features, COUNTS[-1])] * (features > 0)
    where: dict[Mode, Tokens | None] = {"direct": "cls", "rerun": None}  # direct mode changes nothing else
    made = [
        Candidate(op, count, mode, where[mode])
        for mode in modes
        for op in OPS
        if op in ops
        for count in dict.fromkeys(counts)
    ]
    if directions and "direct" in modes and DIRECTION in ops:
        made += [Candidate(DIRECTION, directions, "direct", shift=shift) for shift in SHIFTS]
    return made


def search(
    logits: Callable[[Candidate, NDArray[np.int64]], Array],
    half: Half,
    tried: Sequence[Candidate],
    cap: float,
    track: Callable[[Sequence[Candidate]], Iterable[Candidate]] = iter,
) -> Search:
    """Try candidates on the finding half.

    Args:
        logits: [m, N] under a candidate of m of its images. Raises `InterventionError` for what the bundle cannot do.
        cap: of the average accuracy, at most so much less than before.
        track: yields the candidates, and may show progress.
    """
    refused: dict[str, str] = {}
    after: dict[Candidate, Array] = {}  # of all images

    def judged(candidate: Candidate, found: Array, images: NDArray[np.int64]) -> Trial:
        right = found.argmax(-1) == half.labels[images]
        return Trial(candidate, float(by_cell(right, half.cells[images])[1].min()), float(right.mean()), len(images))

    def attempt(some: Sequence[Candidate], images: NDArray[np.int64]) -> list[Trial]:
        trials = []
        for candidate in track(some):
            if (what := f"{candidate.op}, {candidate.mode}") not in refused:
                try:
                    found = logits(candidate, images)
                except InterventionError as error:
                    refused[what] = str(error)
                    continue
                trials.append(judged(candidate, found, images))
                if len(images) == len(half):
                    after[candidate] = found
        return trials

    rounds, left, sizes = half.rounds(), list(tried), list[int]()
    for number, images in enumerate(rounds):
        none = judged(Candidate("ablate", 0, "rerun"), half.logits[images], images)
        trials = attempt(left, images)
        sizes.append(len(trials))
        if number < len(rounds) - 1:
            trials.sort(key=lambda trial: _promise(trial, none, cap), reverse=True)
            left = [trial.candidate for trial in trials[: math.ceil(len(trials) / KEPT)]]
    if (found := best(trials, none, cap)) is not None and found.candidate.mode == "rerun":
        trials += attempt([replace(found.candidate, tokens=tokens) for tokens in ("patches", "cls")], rounds[-1])
    if (found := best(trials, none, cap)) is not None:
        edited = after[found.candidate]
        for value in dict.fromkeys(np.quantile(moved(half.logits, edited), QUANTILES).round(3).tolist()):
            if value > 0:
                candidate = replace(found.candidate, moves_logit=value)
                trials.append(judged(candidate, conditioned(half.logits, edited, candidate.condition), rounds[-1]))
    return Search(trials, sizes, refused, best(trials, none, cap))


def best(trials: Sequence[Trial], none: Trial, cap: float) -> Trial | None:
    """The one with the best worst group within the cap; of equals that with the better average, then the fewer
    features."""
    allowed = [trial for trial in trials if trial.average >= none.average - cap and trial.worst > none.worst]
    return max(allowed, key=lambda trial: (trial.worst, trial.average, -trial.candidate.count), default=None)


def _promise(trial: Trial, none: Trial, cap: float) -> tuple[float, float]:
    """By which candidates go on: what one loses beyond the cap counts against it, since on few images it may be
    chance."""
    return trial.worst - max(0.0, none.average - cap - trial.average), trial.average
