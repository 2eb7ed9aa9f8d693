"""The report's figures of a CLT, and those that either kind of dictionary has (`training.report.drawing`)."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

from vitrine.models.account.windows import TOKENS, Tokens
from vitrine.models.bootstrap import Estimate
from vitrine.training.evaluation.results import AnyResults, Cascade, Matrix, Results, Spread, TokenFigures
from vitrine.training.evaluation.sae_results import SaeResults
from vitrine.training.report import paper
from vitrine.training.report.drawing import COLOURS, INK, STYLE, bound, by_layer, changes, errors, line, new_figure, svg
from vitrine.training.report.tables import NODE_RANKING_NAMES, RANKING_NAMES, TOKEN_NAMES

_NODE_COLOURS = {
    "sources_mean": "#e07a1f",
    "sources": "#d6457f",
    "direct": "#2a9d8f",
    "gradient": "#7c6bd6",
    "activation": "#4c86c6",
    "random": "#8a8f98",
    "relevance": "#e07a1f",
    "through_errors": "#d6457f",
    "plain": "#b59b2b",
    "tokens": "#7a4b2a",
    "neurons": "#2a9d8f",
}
# Transparent at C = 0, so that the page's background is the middle of the scale in both themes.
_BLUE, _ORANGE = (0.20, 0.45, 0.85), (0.93, 0.52, 0.08)
_SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(0.0, (*_BLUE, 0.95)), (0.5, (*_BLUE, 0.0)), (0.5, (*_ORANGE, 0.0)), (1.0, (*_ORANGE, 0.95))]
)


def reconstruction(results: AnyResults) -> str:
    """R^2 by layer and token type; those of the comparison are dotted."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1, height=3.2)
        for figures, style, suffix in _compared(results):
            for tokens in TOKENS:
                values = [layer.r2 for layer in figures[tokens].layers]
                line(axes[0], values, tokens, TOKEN_NAMES[tokens] + suffix, style)
        by_layer(axes[0], results.layers, "R²")
        bound(axes[0])
        figure.legend(loc="outside upper left", ncols=3, fontsize=9)
        return svg(figure, "reconstruction", "R² by layer for all tokens, [CLS] and patches")


def outliers(results: Results) -> str:
    """R^2 without outliers, median relative error and share of outliers, by layer and token type."""
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(3, height=3.0)
        for panel, (name, scale, label) in zip(
            panels,
            (("r2_kept", 1, "R² without outliers"), ("relative_error", 1, "relative error"), ("outliers", 100, "%")),
            strict=True,
        ):
            for figures, style, suffix in _compared(results)[: 1 if name == "outliers" else 2]:
                for tokens in TOKENS:
                    values = [getattr(layer, name) for layer in figures[tokens].layers]
                    shown = [float("nan") if value is None else scale * value for value in values]
                    line(panel, shown, tokens, TOKEN_NAMES[tokens] + suffix, style)
            panel.set_ylim(bottom=0 if name != "r2_kept" else None)
            bound(panel)
            by_layer(panel, results.layers, label if name != "outliers" else "outlier tokens, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, fontsize=9)
        return svg(figure, "outliers", "R² without outliers, relative error and outliers by layer and token type")


def _compared(results: AnyResults) -> list[tuple[dict[Tokens, TokenFigures], str, str]]:
    """The reconstruction's figures, and those of the comparison: (figures, line style, what to add to the legend)."""
    sets = [(results.reconstruction, "-", "")]
    if isinstance(results, SaeResults):
        sets.append((results.raw, ":", ", raw"))
    if isinstance(results, Results) and results.comparison:
        sets.append((results.comparison.reconstruction, ":", f", {results.comparison.name}"))
    return sets


def sparsity(results: AnyResults) -> str:
    """L0 and dead features by layer."""
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = new_figure(2, height=2.8)
        for tokens in ("cls", "patches"):
            layers = results.reconstruction[tokens].layers
            line(left, [layer.l0 for layer in layers], tokens, TOKEN_NAMES[tokens])
        left.set_ylim(bottom=0)
        left.legend(fontsize=9, loc="lower right")
        dead = [100 * layer.dead_share for layer in results.reconstruction["all"].layers]
        right.bar(range(results.layers), dead, color=COLOURS["random"])
        right.set_ylim(0, max(5.0, *dead) * 1.05)
        by_layer(left, results.layers, "active features per token")
        by_layer(right, results.layers, "dead features, %")
        return svg(figure, "sparsity", "Active features per token, and share of dead features, by layer")


def cascades(results: AnyResults) -> str:
    """Change in top-1 under replacement, with paired intervals, and, for a CLT, the paper's range for all tokens."""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(1, height=3.8)
        axes.axhline(0, color=INK, linewidth=0.8, linestyle=":", label="CLIP itself")
        windows = list(dict.fromkeys(cascade.window for cascade in results.cascades))
        sets: list[tuple[list[Cascade], list[Estimate], str | None, str]] = []
        sets.append((results.cascades, changes(results.cascades), None, ""))
        comparison = results.comparison if isinstance(results, Results) else None
        if comparison:
            sets.append((comparison.cascades, changes(comparison.cascades), "none", f", {comparison.name}"))
        for shift, (series, of_series, face, suffix) in enumerate(sets):
            for at, tokens in enumerate(TOKENS):
                shown = [(c, change) for c, change in zip(series, of_series, strict=True) if c.tokens == tokens]
                positions = [windows.index(c.window) + (at - 1) * 0.2 + shift * 0.08 for c, _ in shown]
                errors(axes, positions, [change for _, change in shown], tokens, TOKEN_NAMES[tokens] + suffix, face)
        label: str | None = "the paper, all tokens"
        for cascade in results.cascades if isinstance(results, Results) else ():
            change = paper.cascade_change(results.layers, cascade.first, cascade.tokens)
            if change and cascade.tokens == "all":
                options: dict[str, Any] = {"color": COLOURS["random"], "alpha": 0.3, "linewidth": 0, "label": label}
                axes.bar(windows.index(cascade.window) - 0.36, change[1] - change[0], 0.12, change[0], **options)
                label = None
        axes.set_xticks(range(len(windows)), windows)
        axes.set_xlim(-0.5, len(windows) - 0.5)
        axes.set(xlabel="layers replaced", ylabel="change in top-1, points")
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside upper left", ncols=5, fontsize=9)
        return svg(figure, "cascades", "Change in zero-shot top-1 by window of replaced layers and by tokens")


def contributions(results: Results) -> str:
    """Heat maps of C: [CLS] and patches, raw and centred."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = new_figure(4, height=8.6, columns=2)
        figure.set_layout_engine("constrained", hspace=0.06)
        shown: list[tuple[str, Matrix]] = []
        for tokens in ("cls", "patches"):
            scores = results.contributions[tokens]
            shown += [(f"{TOKEN_NAMES[tokens]}, raw", scores.raw), (f"{TOKEN_NAMES[tokens]}, centred", scores.centred)]
        for panel, (title, matrix) in zip(axes, shown, strict=True):
            _heat_map(panel, np.array(matrix), title)
        return svg(figure, "contributions", "Contribution scores of every source layer to every target layer")


def faithfulness(results: Results) -> str:
    """Top-1, if it is known, and divergence with the k best source layers kept or dropped; random orders as a band."""
    names = ["keep_divergence", "drop_divergence"]
    if results.baseline:
        names = ["keep", "drop", *names]
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(len(names), height=1.4 * len(names), columns=2)
        measured = results.faithfulness
        assert measured is not None
        for axes, name in zip(panels, names, strict=True):
            scale = 1 if name.endswith("divergence") else 100
            _band(axes, getattr(measured, f"random_{name}"), scale)
            if scale == 100 and results.baseline:
                own = 100 * results.baseline.value
                axes.axhline(own, color=INK, linewidth=0.8, linestyle=":", label="CLIP itself")
            for curve in measured.curves:
                values = [scale * getattr(point, "value", point) for point in getattr(curve, name)]
                line(axes, values, curve.ranking, RANKING_NAMES[curve.ranking])
            axes.set_xticks(range(results.layers + 1))
            axes.set_xlabel(f"best-ranked source layers {'kept' if name.startswith('keep') else 'dropped'}")
        panels[0].set_ylabel("zero-shot top-1, %")
        panels[-2].set_ylabel("divergence, nats")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=5, fontsize=9)
        top1 = "Zero-shot top-1, and divergence" if results.baseline else "Divergence"
        description = f"{top1} from CLIP's prediction, by number of source layers kept and dropped"
        return svg(figure, "faithfulness", description)


def _band(axes: Axes, spreads: list[Spread], scale: float) -> None:
    """Random orders: their mean, and the range from lowest to highest."""
    if spreads:
        positions, colour = range(len(spreads)), COLOURS["random"]
        lowest = [scale * spread.lowest for spread in spreads]
        highest = [scale * spread.highest for spread in spreads]
        axes.fill_between(positions, lowest, highest, alpha=0.22, linewidth=0, color=colour)
        means = [scale * spread.mean for spread in spreads]
        axes.plot(positions, means, linestyle="--", label="random order", color=colour)


def nodes(results: AnyResults) -> str:
    """What is left of the logit by fraction of nodes deleted, and inserted, with 95 % intervals."""
    measured = results.nodes
    assert measured is not None
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(2, height=3.6)
        for axes, way in zip(panels, ("deletion", "insertion"), strict=True):
            for curve in measured.curves:
                shares = [point.above_mean for point in getattr(curve, way)]
                colour, positions = _NODE_COLOURS[curve.ranking], range(len(shares))
                axes.fill_between(
                    positions, [s.low for s in shares], [s.high for s in shares], color=colour, alpha=0.12, linewidth=0
                )
                label = NODE_RANKING_NAMES[curve.ranking]
                axes.plot(positions, [s.value for s in shares], color=colour, marker="o", markersize=3.5, label=label)
            axes.axhline(0, color=INK, linewidth=0.8, linestyle=":")
            axes.set_xticks(
                range(len(measured.fractions)), [f"{100 * fraction:g}" for fraction in measured.fractions], fontsize=8
            )
            axes.set_xlabel(f"active nodes {'deleted' if way == 'deletion' else 'inserted'}, %")
        panels[0].set_ylabel("share of the logit left")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, fontsize=9)
        return svg(figure, "nodes", "Share of the logit by fraction of nodes deleted and inserted, by ranking")


def retrieval(results: Results) -> str:
    """Share of neighbours with the query's class, by layer."""
    measured = results.retrieval
    assert measured is not None
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(1, height=2.8)
        errors(axes, list(range(results.layers)), measured.layers, "cls", "sparse code at [CLS]", None)
        axes.plot([100 * share.value for share in measured.layers], color=COLOURS["cls"], linewidth=1)
        axes.axhline(100 * measured.embedding.value, color=COLOURS["all"], linewidth=1.2, label="CLIP's embedding")
        axes.axhline(100 * measured.chance, color=COLOURS["random"], linewidth=1.2, linestyle="--", label="chance")
        axes.set_ylim(0, 100)
        by_layer(axes, results.layers, "same class, %")
        figure.legend(loc="outside upper left", ncols=3, fontsize=9)
        return svg(figure, "retrieval", "Share of the nearest images that have the query's class, by layer")


def _heat_map(axes: Axes, matrix: np.ndarray, title: str) -> None:
    layers = len(matrix)
    reach = max(0.05, float(np.abs(matrix).max()))
    masked = np.ma.masked_where(np.triu(np.ones_like(matrix), 1) > 0, matrix)
    axes.pcolormesh(masked, cmap=_SIGNED, norm=TwoSlopeNorm(0, -reach, reach), edgecolors="none")
    if layers <= 16:
        for target, source in zip(*np.tril_indices(layers), strict=True):
            text = f"{matrix[target, source]:.2f}".replace("0.", ".")
            axes.text(source + 0.5, target + 0.5, text, ha="center", va="center", fontsize=6.5)
    ticks = np.arange(0, layers, 1 if layers <= 16 else 4)
    axes.set_xticks(ticks + 0.5, ticks)
    axes.set_yticks(ticks + 0.5, ticks)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11)
    axes.set(xlabel="source layer", ylabel="target layer")
