"""Directions in which groups differ: by hand, and what an edit along them leaves."""

import numpy as np
import pytest

from vitrine.service.offline.debias.directions import Direction, cell_mean, directions, drawn

LABELS = np.array([0, 0, 0, 0, 1, 1, 1])
GROUPS = np.array([0, 0, 1, 1, 0, 0, 1])


def streams(shift):
    """Labels differ along the first axis, groups by `shift`."""
    rows = np.zeros((7, 3))
    rows[:, 0] = 10 * LABELS
    rows += np.outer(GROUPS, shift)
    rows[0, 2], rows[1, 2] = 0.5, -0.5
    return rows


def test_the_difference_within_labels_and_what_lies_between():
    (found,) = directions(streams((0, 3, 4)), LABELS, GROUPS, [1])
    assert found.vector == (0.0, 0.6, 0.8)
    assert found.length == pytest.approx(5)
    assert found.between == pytest.approx(2.5), "cells counted alike, though one has a single image"
    assert found.group == 1
    np.testing.assert_allclose(cell_mean(streams((0, 3, 4)), LABELS, GROUPS), [5, 1.5, 2])


def test_after_the_edit_the_means_of_the_groups_are_the_same():
    generator = np.random.default_rng(0)
    labels, groups = generator.integers(0, 2, (2, 200))
    rows = generator.standard_normal((200, 8)) + np.outer(labels, np.arange(8)) + np.outer(groups, np.ones(8))
    (found,) = directions(rows, labels, groups, [1])
    unit = np.array(found.vector) / np.linalg.norm(found.vector)
    edited = rows + (found.between - rows @ unit)[:, None] * unit
    (left,) = directions(edited, labels, groups, [1]) or [None]
    assert left is None or left.length < 1e-5 * found.length


def test_a_group_that_no_label_has_beside_others_has_no_direction():
    assert directions(streams((0, 0, 1)), LABELS, LABELS, [1]) == []
    assert directions(np.ones((7, 3)), LABELS, GROUPS, [1]) == []


def test_directions_drawn_at_random_are_set_to_the_mean():
    middle = np.array([1.0, 2.0, 3.0, 4.0])
    like = [Direction((1.0, 0.0, 0.0, 0.0), 0.0, 0, length) for length in (1.0, 2.0, 3.0)]
    found = drawn(like, middle, np.random.default_rng(0))
    assert [one.length for one in found] == pytest.approx([1, 2, 3])
    assert len({one.vector for one in found}) == 3
    for one in found:
        assert one.between == pytest.approx(middle @ one.vector, abs=1e-4)
        assert np.linalg.norm(one.vector) == pytest.approx(1, abs=1e-5)
