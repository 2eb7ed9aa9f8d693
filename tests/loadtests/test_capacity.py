"""Machines and cost for a load, by hand."""

import pytest

from capacity import plan


def test_a_plan_by_hand():
    # 10 a second on average, 20 at the peak; each takes 0.1 s of a unit that may be busy half of its time: 4 units.
    result = plan(864_000, milliseconds=100, price=0.5, peak=2, load=0.5)
    assert result == (10, 20, 4, pytest.approx(4 * 0.5 * 24), pytest.approx(2 * 0.5 * 24))


def test_there_is_at_least_one_of_them():
    result = plan(1, milliseconds=1, price=2.0)
    assert (result.units, result.dollars, result.scaled) == (1, 48, 48)
