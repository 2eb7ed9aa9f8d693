"""Conditions that compare two predictions, against what they say, image by image."""

import numpy as np
import pytest

from vitrine.models.interventions.conditions import applied, moved
from vitrine.models.interventions.edit import Condition


def test_the_lead_is_that_of_the_plain_first_over_its_runner_up():
    before, after = np.array([[3.0, 1.0, 2.0]]), np.array([[1.0, 9.0, 2.5]])
    assert moved(before, after)[0] == pytest.approx(2.5), "a lead of 1 becomes -1.5, whatever the third does"
    generator = np.random.default_rng(0)
    before, after = generator.standard_normal((2, 50, 3))
    for number, distance in enumerate(moved(before, after)):
        first, second = np.argsort(-before[number])[:2]
        leads = [part[number, first] - part[number, second] for part in (before, after)]
        assert distance == pytest.approx(abs(leads[1] - leads[0]))
    threshold = float(np.median(moved(before, after)))
    assert applied(Condition(moves_logit=threshold), before, after).sum() == 25


def test_one_label_has_no_runner_up():
    before, after = np.ones((2, 1)), np.zeros((2, 1))
    assert not applied(Condition(moves_logit=1e-9), before, after).any()


def test_another_prediction():
    before, after = np.array([[2.0, 1.0], [2.0, 1.0]]), np.array([[1.0, 2.0], [5.0, 4.0]])
    assert applied(Condition(changes_prediction=True), before, after).tolist() == [True, False]
