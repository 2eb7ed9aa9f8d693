"""The edit that is chosen: the best worst group within the cap, and what cannot be done is told apart."""

import numpy as np
import pytest

from vitrine.models.interventions.changes import InterventionError
from vitrine.models.interventions.edit import Condition
from vitrine.models.interventions.spec import Intervention
from vitrine.service.offline.debias import search as search_module
from vitrine.service.offline.debias.candidates import DIRECTION, OPS, Candidate, Feature, Found
from vitrine.service.offline.debias.directions import Direction
from vitrine.service.offline.debias.firing import Firing
from vitrine.service.offline.debias.search import SHIFTS, Half, candidates, search

CELLS = np.repeat([0, 1, 2, 3], 10)
LABELS = CELLS // 2


def wrong(**counts):
    """Logits [n, 2] with so many mistakes in cells a to d."""
    predicted = LABELS.copy()
    for name, count in counts.items():
        predicted[10 * "abcd".index(name) :][:count] ^= 1
    return np.eye(2)[predicted]


def run(outcome, cap=0.01, modes=("rerun",), directions=0):
    half = Half(LABELS, CELLS, wrong(b=6))
    return search(lambda candidate, images: outcome(candidate)[images], half, candidates(modes, 4, directions), cap)


def test_the_best_worst_group_within_the_cap_is_chosen():
    outcomes = {"ablate": wrong(b=1, a=4), "project": wrong(a=2, b=2, c=2, d=2), "ablate to mean": wrong(b=3)}

    def outcome(candidate):
        return outcomes.get(candidate.op, wrong(b=6)) if candidate.count == 4 else wrong(b=6)

    found = run(outcome)
    assert found.best.candidate == Candidate("ablate to mean", 4, "rerun"), "of equals, the first"
    assert (found.best.worst, found.best.average, found.best.images) == (0.7, 37 / 40, 40)
    assert run(outcome, cap=0.05).best.candidate.op == "project"


def test_no_edit_is_proposed_where_none_is_better():
    assert run(lambda candidate: wrong(b=6)).best is None
    assert run(lambda candidate: wrong(a=1, b=6)).best is None


def test_what_a_bundle_cannot_do_is_tried_once_and_named():
    asked = []

    def outcome(candidate):
        asked.append(candidate)
        if candidate.op == "ablate to mean" or candidate.mode == "direct":
            raise InterventionError("the bundle has no average image")
        return wrong(b=5)

    found = run(outcome, modes=("direct", "rerun"))
    assert found.refused["ablate to mean, rerun"] == "the bundle has no average image"
    assert len(found.refused) == len(OPS) + 1
    assert sum(candidate.mode == "direct" for candidate in asked) == len(OPS)


def test_a_quarter_of_the_edits_goes_on_to_more_images_of_every_cell(monkeypatch):
    monkeypatch.setattr(search_module, "IMAGES", (8, 16))
    seen = []

    def logits(candidate, images):
        seen.append((candidate, images))
        good = {"ablate": 1, "project": 2}.get(candidate.op, 5)
        return wrong(b=good)[images]

    tried = candidates(("rerun",), 4, 0)
    found = search(logits, Half(LABELS, CELLS, wrong(b=6)), tried, 0.01)
    assert found.tried == [12, 3, 1]
    first, last = next(images for _, images in seen if len(images) == 8), seen[-3][1]
    assert np.bincount(CELLS[first]).tolist() == [2, 2, 2, 2]
    assert len(last) == 40
    assert found.best.candidate.op == "ablate"
    assert {trial.images for trial in found.trials} == {40}


def test_a_rare_cell_is_in_every_round_whole(monkeypatch):
    monkeypatch.setattr(search_module, "IMAGES", (12,))
    cells = np.array([0] * 3 + [1] * 40)
    first, last = Half(np.zeros(43, int), cells, np.zeros((43, 2))).rounds()
    assert (len(first), np.bincount(cells[first]).tolist(), len(last)) == (12, [3, 9], 43)


def test_a_direction_is_tried_in_direct_mode_alone():
    assert run(lambda one: wrong(b=1), modes=("direct",), directions=1).tried[0] == 12 + len(SHIFTS)
    assert DIRECTION not in {one.op for one in candidates(("rerun",), 4, 1)}
    assert {one.op for one in candidates(("direct",), 0, 2)} == {DIRECTION}


def test_only_what_is_asked_for_is_tried():
    assert {one.op for one in candidates(("direct", "rerun"), 4, 1, ("project", DIRECTION))} == {"project", DIRECTION}
    assert {one.op for one in candidates(("rerun",), 4, 1, ("project",))} == {"project"}


def test_an_edit_that_moves_images_a_little_for_the_worse_is_made_conditional():
    """All of b move by 3 logits, and are right then; half of d move by 0.4, and are wrong then."""
    before, after = wrong(), wrong()
    before[10:20], after[10:20] = [0, 1], [2, 0]
    before[30:35], after[30:35] = [0.4, 0.6], [0.6, 0.4]
    found = search(lambda one, images: after[images], Half(LABELS, CELLS, before), candidates(("rerun",), 1, 0), 0.2)
    assert found.best.worst == 1.0
    assert found.best.candidate.moves_logit == pytest.approx(0.4 + 0.25 * 2.6), "a quarter moves as much"
    assert found.best.candidate.condition == Condition(moves_logit=found.best.candidate.moves_logit)
    assert "if that changes the lead" in found.best.candidate.title


@pytest.mark.parametrize("op", OPS)
def test_every_candidate_is_a_valid_intervention(op):
    features, firings = [Feature(3, 7), Feature(1, 2)], [Firing((1, 4), 0.5), Firing((0,), -1.0)]
    found = Found(features, firings, [], np.zeros(2), 4)
    for tokens in (None, "cls"):
        made = Candidate(op, 2, "rerun", tokens).interventions(found)
        assert [Feature(item.layer, item.index) for item in made] == features
        assert all(isinstance(item, Intervention) for item in made)
    if op.startswith("set"):
        assert Candidate(op, 1, "rerun").interventions(found)[0].where == (1, 4)


def test_directions_are_set_after_the_last_layer_at_cls():
    found = Found([], [], [Direction((0.6, 0.8), 1.5, 0, 5.0)], np.zeros(2), 4)
    (made,) = Candidate(DIRECTION, 1, "direct").interventions(found)
    assert (made.op, made.layer, made.vector, made.value, made.where) == ("project", 3, (0.6, 0.8), 1.5, "cls")
    (beyond,) = Candidate(DIRECTION, 1, "direct", shift=-0.1).interventions(found)
    assert beyond.value == pytest.approx(1.0)
