"""The edit that is proposed: of many tried on the finding half, the one with the best worst group.

Of those that lose at most `cap` of the average accuracy. First every op with every number of features, then the best of
them at [CLS] and at the patches alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vitrine.models.groups import by_cell
from vitrine.models.interventions.changes import InterventionError
from vitrine.models.interventions.spec import Mode, Tokens
from vitrine.service.offline.debias.candidates import OPS, Candidate

COUNTS = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Trial:
    """A candidate's accuracies on the finding half; None: this bundle cannot do it, and why."""

    candidate: Candidate
    worst: float
    average: float


@dataclass(frozen=True)
class Search:
    trials: list[Trial]
    refused: dict[str, str]  # of an op and mode that this bundle cannot do, why
    best: Trial | None  # None: none was better than no edit, within the cap


def search(
    predict: Callable[[Candidate], NDArray[np.integer]],
    before: NDArray[np.integer],
    labels: NDArray[np.int64],
    cells: NDArray[np.int64],
    modes: Sequence[Mode],
    features: int,
    cap: float,
    track: Callable[[Sequence[Candidate]], Iterable[Candidate]] = iter,
) -> Search:
    """Try candidates on the finding half, n images.

    Args:
        predict: predicted labels [n] under a candidate. Raises `InterventionError` for what the bundle cannot do.
        before: predicted labels without an edit.
        features: how many there are to be changed.
        cap: of the average accuracy, at most so much less than before.
        track: yields the candidates, and may show progress.
    """
    refused: dict[str, str] = {}
    trials: list[Trial] = []

    def judged(candidate: Candidate, predicted: NDArray[np.integer]) -> Trial:
        right = predicted == labels
        return Trial(candidate, float(by_cell(right, cells)[1].min()), float(right.mean()))

    def attempt(candidates: Sequence[Candidate]) -> None:
        for candidate in track(candidates):
            if (what := f"{candidate.op}, {candidate.mode}") not in refused:
                try:
                    trials.append(judged(candidate, predict(candidate)))
                except InterventionError as error:
                    refused[what] = str(error)

    counts = [count for count in COUNTS if count < features] + [features]
    where: dict[Mode, Tokens | None] = {"direct": "cls", "rerun": None}  # direct mode changes nothing else
    counts = [count for count in counts if count <= COUNTS[-1]]
    attempt([Candidate(op, count, mode, where[mode]) for mode in modes for op in OPS for count in counts])
    none = judged(Candidate("ablate", 0, "rerun"), before)
    if (found := best(trials, none, cap)) is not None and found.candidate.mode == "rerun":
        attempt([replace(found.candidate, tokens=tokens) for tokens in ("patches", "cls")])
    return Search(trials, refused, best(trials, none, cap))


def best(trials: Sequence[Trial], none: Trial, cap: float) -> Trial | None:
    """The one with the best worst group within the cap; of equals that with the better average, then the fewer
    features."""
    allowed = [trial for trial in trials if trial.average >= none.average - cap and trial.worst > none.worst]
    return max(allowed, key=lambda trial: (trial.worst, trial.average, -trial.candidate.count), default=None)
