"""The edit that is chosen: the best worst group within the cap, and what cannot be done is told apart."""

import numpy as np
import pytest

from vitrine.models.interventions.changes import InterventionError
from vitrine.models.interventions.spec import Intervention
from vitrine.service.offline.debias.candidates import OPS, Candidate, Feature
from vitrine.service.offline.debias.firing import Firing
from vitrine.service.offline.debias.search import search

CELLS = np.repeat([0, 1, 2, 3], 10)
LABELS = CELLS // 2


def wrong(**counts):
    """Predictions with so many mistakes in cells a to d."""
    predicted = LABELS.copy()
    for name, count in counts.items():
        predicted[10 * "abcd".index(name) :][:count] ^= 1
    return predicted


def run(predict, cap=0.01, modes=("rerun",)):
    return search(predict, wrong(b=6), LABELS, CELLS, modes, 4, cap)


def test_the_best_worst_group_within_the_cap_is_chosen():
    outcomes = {"ablate": wrong(b=1, a=4), "project": wrong(a=2, b=2, c=2, d=2), "ablate to mean": wrong(b=3)}

    def predict(candidate):
        return outcomes.get(candidate.op, wrong(b=6)) if candidate.count == 4 else wrong(b=6)

    found = run(predict)
    assert found.best.candidate == Candidate("ablate to mean", 4, "rerun"), "of equals, the first"
    assert (found.best.worst, found.best.average) == (0.7, 37 / 40)
    assert run(predict, cap=0.05).best.candidate.op == "project"


def test_no_edit_is_proposed_where_none_is_better():
    assert run(lambda candidate: wrong(b=6)).best is None
    assert run(lambda candidate: wrong(a=1, b=6)).best is None


def test_what_a_bundle_cannot_do_is_tried_once_and_named():
    asked = []

    def predict(candidate):
        asked.append(candidate)
        if candidate.op == "ablate to mean" or candidate.mode == "direct":
            raise InterventionError("the bundle has no average picture")
        return wrong(b=5)

    found = run(predict, modes=("direct", "rerun"))
    assert found.refused["ablate to mean, rerun"] == "the bundle has no average picture"
    assert len(found.refused) == len(OPS) + 1
    assert sum(candidate.mode == "direct" for candidate in asked) == len(OPS)


@pytest.mark.parametrize("op", OPS)
def test_every_candidate_is_a_valid_intervention(op):
    features, firings = [Feature(3, 7), Feature(1, 2)], [Firing((1, 4), 0.5), Firing((0,), -1.0)]
    for tokens in (None, "cls"):
        made = Candidate(op, 2, "rerun", tokens).interventions(features, firings)
        assert [Feature(item.layer, item.index) for item in made] == features
        assert all(isinstance(item, Intervention) for item in made)
    if op.startswith("set"):
        assert Candidate(op, 1, "rerun").interventions(features, firings)[0].where == (1, 4)
