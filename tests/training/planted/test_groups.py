"""Accuracy by group against figures computed by hand."""

import numpy as np
import pytest

from vitrine.training.planted.data import Row
from vitrine.training.planted.groups import change, group_accuracy

ROWS = [
    Row("", label, group, "test", False) for label in ("cat", "dog") for group in ("red", "plain") for _ in range(40)
]
BEFORE = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0], bool).repeat(10)  # .75, 1, .25, .5
AFTER = np.array([1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 0], bool).repeat(10)  # .75, .75, .75, .5


def test_by_hand():
    found = group_accuracy(ROWS, BEFORE)
    assert {group: figure.value for group, figure in found.groups.items()} == {
        "cat, red": 0.75,
        "cat, plain": 1.0,
        "dog, red": 0.25,
        "dog, plain": 0.5,
    }
    assert (found.worst.value, found.average.value) == (0.25, 0.625)
    assert found.groups["cat, plain"].low == 1
    assert found.worst.low < 0.25 < found.worst.high
    assert found.average.low == pytest.approx(0.625 - 1.96 * (0.0625 * (0.1875 + 0.1875 + 0.25) / 40) ** 0.5, abs=0.01)


def test_changes_are_of_the_worst_group_whichever_it_is_then():
    worst, average = (change(ROWS, BEFORE, AFTER, worst=kind) for kind in (True, False))
    assert (worst.value, average.value) == (0.25, 0.0625)
    nothing = change(ROWS, AFTER, AFTER, worst=True)
    assert (nothing.low, nothing.value, nothing.high) == (0, 0, 0)
