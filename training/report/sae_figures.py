"""The report's figures that only residual SAEs have (`training.report.drawing`)."""

from __future__ import annotations

import matplotlib

from vitrine.training.evaluation.sae_results import LayerLevels, SaeResults
from vitrine.training.report.drawing import COLOURS, INK, STYLE, by_layer, changes, errors, line, new_figure, svg


def singles(results: SaeResults) -> str:
    """Change in top-1, with paired intervals, and divergence with the stream replaced after one block."""
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = new_figure(2, height=2.8)
        left.axhline(0, color=INK, linewidth=0.8, linestyle=":")
        errors(left, list(range(results.layers)), changes(results.singles), "all", "all tokens", None)
        line(right, [cascade.divergence.value for cascade in results.singles], "all", "all tokens")
        right.set_ylim(bottom=0)
        by_layer(left, results.layers, "change in top-1, points")
        by_layer(right, results.layers, "divergence, nats")
        return svg(figure, "singles", "Change in top-1, and divergence, with the stream replaced after one block")


def levels(results: SaeResults) -> str:
    """What features answer to by depth, with quartiles, beside chance, untrained SAEs and the stream's channels."""
    measured = results.levels
    names = {"position": "position", "of_class": "class", "colour": "mean colour", "purity": "purity"}
    colour = COLOURS["cls"]
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(len(names), height=5.2, columns=2)
        for axes, (name, label) in zip(panels, names.items(), strict=True):
            low, high = _by_depth(measured.features, name, "low"), _by_depth(measured.features, name, "high")
            axes.fill_between(range(results.layers), low, high, color=colour, alpha=0.18, linewidth=0)
            for of_layers, of_figure, style, shade, legend in (
                (measured.features, "median", "-", colour, "features, with quartiles"),
                (measured.untrained, "median", "--", COLOURS["all"], "untrained"),
                (measured.neurons, "median", "-.", COLOURS["patches"], "neurons"),
                (measured.features, "chance", ":", COLOURS["random"], "features, shuffled"),
            ):
                values = _by_depth(of_layers, name, of_figure)
                axes.plot(range(results.layers), values, style, color=shade, marker="o", markersize=3, label=legend)
            axes.set_ylim(bottom=0)
            by_layer(axes, results.layers, label)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=9)
        return svg(figure, "levels", "What features respond to, by depth: position, class, colour and purity")


def beside(results: SaeResults) -> str:
    """What is left of the logit by number of nodes deleted, and inserted, by both dictionaries' own accounts."""
    assert results.beside is not None
    ours, theirs = results.nodes, results.beside.nodes
    assert ours is not None
    assert theirs is not None
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(2, height=3.4)
        for axes, way in zip(panels, ("deletion", "insertion"), strict=True):
            for of_nodes, ranking, colour, style, label in (
                (ours, "relevance", COLOURS["cls"], "-", "residual SAEs, relevance"),
                (ours, "random", COLOURS["cls"], ":", "residual SAEs, random"),
                (theirs, "sources_mean", COLOURS["patches"], "-", "CLT, sources about the mean"),
                (theirs, "random", COLOURS["patches"], ":", "CLT, random"),
            ):
                curve = of_nodes.curve(ranking)
                points = [point.above_mean for point in getattr(curve, way)][1:]
                counts = [max(1.0, fraction * curve.active) for fraction in of_nodes.fractions[1:]]
                low, high = [point.low for point in points], [point.high for point in points]
                axes.fill_between(counts, low, high, color=colour, alpha=0.12, linewidth=0)
                axes.plot(counts, [p.value for p in points], style, color=colour, marker="o", markersize=3, label=label)
            axes.axhline(0, color=INK, linewidth=0.8, linestyle=":")
            axes.set_xscale("log")
            axes.set_xlabel(f"nodes {'deleted' if way == 'deletion' else 'inserted'}")
        panels[0].set_ylabel("share of the logit left")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=9)
        return svg(
            figure, "beside", "Share of the logit by number of nodes deleted and inserted, for both dictionaries"
        )


def _by_depth(of_layers: list[LayerLevels], name: str, of_figure: str) -> list[float]:
    """NaN where there is no figure."""
    figures = (getattr(of_layer, name) for of_layer in of_layers)
    return [float("nan") if figure is None else getattr(figure, of_figure) for figure in figures]
