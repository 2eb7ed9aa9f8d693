"""How the report's figures are drawn: inline SVG that follows the page's light or dark theme.

Matplotlib writes colours into the SVG; two placeholder colours are replaced afterwards by the page's own: `INK` by the
text colour, `_LINE` by `var(--line)`. Text is kept as text. Ids are prefixed with the figure's name, so that several
figures can be on one page.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitrine.models.bootstrap import Estimate
from vitrine.training.evaluation.results import Cascade

FAR = 8  # times the range of the middle half; what lies further away is an outlier of a plot
INK, _LINE = "#010203", "#fdfcfb"
COLOURS = {"all": "#2a9d8f", "cls": "#e07a1f", "patches": "#7c6bd6", "image": "#d6457f", "random": "#8a8f98"}
MARKERS = {"all": "o", "cls": "s", "patches": "^", "image": "D"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,  # as everywhere that a number is printed
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
}


def new_figure(panels: int, height: float, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    columns = columns or panels
    figure = Figure(figsize=(8.6, height), layout="constrained")
    axes = figure.subplots(panels // columns, columns, squeeze=False)
    return figure, list(axes.flat)


def line(axes: Axes, values: Sequence[float], kind: str, label: str, style: str = "-") -> None:
    marker: dict[str, Any] = {"marker": MARKERS[kind], "markersize": 4.5}
    axes.plot(range(len(values)), values, color=COLOURS[kind], linestyle=style, label=label, **marker)


def errors(
    axes: Axes, positions: Sequence[float], estimates: list[Estimate], kind: str, label: str, face: str | None
) -> None:
    values = np.array([100 * estimate.value for estimate in estimates])
    reach = [values - [100 * e.low for e in estimates], [100 * e.high for e in estimates] - values]
    options: dict[str, Any] = {
        "fmt": MARKERS[kind],
        "markersize": 5.5,
        "markerfacecolor": face,
        "elinewidth": 1.2,
        "capsize": 2.5,
    }
    axes.errorbar(positions, values, np.maximum(reach, 0), color=COLOURS[kind], label=label, **options)


def by_layer(axes: Axes, layers: int, label: str) -> None:
    axes.set_xticks(range(layers))
    axes.set(xlabel="layer", ylabel=label)


def bound(axes: Axes) -> None:
    """Let values far from all others not flatten the rest: they stand at the edge, with an arrow and their number."""
    drawn = [line.get_xydata() for line in axes.get_lines() if line.get_transform() is axes.transData]
    points = np.concatenate([np.empty((0, 2)), *(np.asarray(of_line, float) for of_line in drawn)])
    points = points[np.isfinite(points).all(1)]
    if len(points) < 4:
        return
    low, high = np.percentile(points[:, 1], [25, 75])
    reach = FAR * max(high - low, 0.01)
    is_far = (points[:, 1] < low - reach) | (points[:, 1] > high + reach)
    if not is_far.any():
        return
    least, most = points[~is_far, 1].min(), points[~is_far, 1].max()
    margin = 0.15 * (most - least or 0.01)
    axes.set_ylim(least - margin, most + margin)
    for x, y in points[is_far]:
        above = y > high
        axes.annotate(
            f"{'↑' if above else '↓'} {y:.3g}",
            (x, 1 if above else 0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top" if above else "bottom",
            fontsize=8,
        )


def _is_empty(axes: Axes) -> bool:
    """Whether nothing that was measured is drawn: lines across the whole panel are none of it."""
    lines = [line.get_ydata() for line in axes.get_lines() if line.get_transform() is axes.transData]
    areas = [path.vertices for collection in axes.collections for path in collection.get_paths()]
    return not axes.patches and not any(np.isfinite(np.asarray(of, float)).any() for of in (*lines, *areas))


def standalone(drawn: str) -> str:
    """An <svg> element of a page as a file of its own, dark on white."""
    drawn = drawn.replace("currentColor", "#1d1f23").replace("var(--line)", "#d5d8dd")
    return drawn.replace("<svg", '<svg style="background: #fff" font-family="sans-serif"', 1) + "\n"


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element. A panel without a figure says that it has none."""
    for axes in figure.axes:
        if _is_empty(axes):
            axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", va="center")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r'\bid="', f'id="{name}-', drawn)
    drawn = re.sub(r'(url\(#|href="#)', rf"\1{name}-", drawn)
    drawn = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawn, count=1)  # the page sets the size
    drawn = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawn, count=1)
    drawn = re.sub(r"font-family: [^;]*; ", "", drawn)
    drawn = re.sub(r"<style.*?</style>", "", drawn, flags=re.DOTALL)  # would apply to the whole page
    drawn = drawn.replace(INK, "currentColor").replace(_LINE, "var(--line)")
    return drawn.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)


def changes(series: list[Cascade]) -> list[Estimate]:
    return [cascade.difference for cascade in series if cascade.difference is not None]
