"""How the report's figures are drawn: panels without a figure, values far from all others, files of their own."""

from xml.etree import ElementTree

import matplotlib
import pytest

from vitrine.training.report.drawing import STYLE, bound, line, new_figure, standalone, svg


@pytest.fixture
def panels():
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2, 3.0)
        yield figure, *axes


def test_a_panel_without_a_figure_says_so(panels):
    figure, left, right = panels
    left.axhline(0)  # which was not measured
    line(left, [float("nan")] * 3, "cls", "x")
    line(right, [float("nan"), 0.5], "cls", "x")
    assert svg(figure, "name", "what").count("nothing to show") == 1


@pytest.mark.parametrize(("far", "shown"), [(-40.0, "↓ -40"), (77.0, "↑ 77")])
def test_a_value_far_from_all_others_flattens_nothing(panels, far, shown):
    figure, left, right = panels
    for axes, values in ((left, [0.9, 0.92, far, 0.91, 0.94]), (right, [0.9, 0.5, 0.2, 0.8, 0.1])):
        line(axes, values, "all", "x")
        before = axes.get_ylim()
        bound(axes)
        assert (axes.get_ylim() == before) is (axes is right)
    low, high = left.get_ylim()
    assert 0.85 < low < 0.9
    assert 0.94 < high < 1
    assert svg(figure, "name", "what").count(shown) == 1


def test_a_figure_as_a_file_of_its_own(panels):
    figure, left, _ = panels
    line(left, [0.5, 0.6], "cls", "x")
    drawn = standalone(svg(figure, "name", "what"))
    assert ElementTree.fromstring(drawn).get("aria-label") == "what"
    assert "var(" not in drawn
    assert "currentColor" not in drawn
