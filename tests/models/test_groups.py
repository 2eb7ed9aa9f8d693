"""Accuracies by group and of the worst, against figures counted by hand."""

import numpy as np
import pytest

from vitrine.models.bootstrap import Bootstrap
from vitrine.models.groups import Grouped, Judge, by_cell

# cat, plain: 3 of 4 right; cat, red: 2 of 2; dog, plain: 1 of 1; dog, red: 1 of 3
LABELS = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
GROUPS = np.array([0, 0, 0, 0, 1, 1, 0, 1, 1, 1])
BEFORE = np.array([0, 0, 0, 1, 0, 0, 1, 1, 0, 0])
AFTER = np.array([0, 0, 0, 1, 0, 1, 1, 1, 1, 0])


@pytest.fixture
def images():
    return Grouped(labels=LABELS, groups=GROUPS, label_names=("cat", "dog"), group_names=("plain", "red"))


def test_accuracies_are_those_counted_by_hand(images):
    found = Judge(images).accuracy(BEFORE)
    figures = {(group.label, group.group): (group.images, group.accuracy.value) for group in found.groups}
    assert figures == {
        ("cat", "plain"): (4, 0.75),
        ("cat", "red"): (2, 1.0),
        ("dog", "plain"): (1, 1.0),
        ("dog", "red"): (3, pytest.approx(1 / 3)),
    }
    assert (found.average.value, found.worst.value) == (0.7, pytest.approx(1 / 3))
    assert found.worst_group == "dog, red"
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in (found.average, found.worst))
    assert found.groups[1].accuracy.low == 1.0, "both are right, whichever are drawn"


def test_changes_are_paired_and_the_worst_group_may_be_another(images):
    change = Judge(images).change(BEFORE, AFTER)
    assert change.average.value == pytest.approx(0.0)
    assert change.worst.value == pytest.approx(1 / 2 - 1 / 3)
    same = Judge(images).change(BEFORE, BEFORE)
    assert (same.average.low, same.worst.high) == (0.0, 0.0)


def test_the_interval_of_the_worst_group_is_of_its_resamples(images):
    bootstrap = Bootstrap(10, seed=5)
    counts = bootstrap.drawn(0, 10)
    right, cells = BEFORE == LABELS, 2 * LABELS + GROUPS
    worst = []
    for drawn in counts:
        present = [cell for cell in range(4) if drawn[cells == cell].sum()]
        worst.append(min((drawn * right)[cells == cell].sum() / drawn[cells == cell].sum() for cell in present))
    found = Judge(images, seed=5).accuracy(BEFORE).worst
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(worst, [0.025, 0.975])))


def test_only_cells_that_have_images_are_counted():
    present, accuracies = by_cell(np.array([True, False, True]), np.array([5, 5, 2]))
    assert (present.tolist(), accuracies.tolist()) == ([2, 5], [1.0, 0.5])
