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


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element."""
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
