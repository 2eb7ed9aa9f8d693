import math

import pytest

from vitrine.training.run.schedules import learning_rate, ramp, widening


def test_learning_rate_by_hand():
    cosine = [4 * (1 + math.cos(math.pi * share)) for share in (0.2, 0.4, 0.6, 0.8, 1)]
    expected = [2, 4, 6, 8, 8, 8, *cosine]
    assert [learning_rate(step, 10, 8, 4, 0.5) for step in range(11)] == pytest.approx(expected)


def test_learning_rate_without_warm_up_that_decays_all_along():
    root = math.sqrt(0.5) / 2
    assert [learning_rate(step, 4, 1, 0, 1) for step in range(5)] == pytest.approx([1, 0.5 + root, 0.5, 0.5 - root, 0])


def test_ramp():
    assert [ramp(step, 10, 0.5) for step in (0, 1, 4, 5, 9)] == pytest.approx([0, 0.2, 0.8, 1, 1])
    assert ramp(0, 10, 0) == 1


def test_widening_falls_to_one():
    assert [widening(step, 10, 3, 0.5) for step in (0, 1, 5, 9)] == pytest.approx([3, 2.6, 1, 1])
    assert widening(0, 10, 1, 0) == 1
