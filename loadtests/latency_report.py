"""report.html of a load test: one file, readable without network or scripts."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib

from rows import PERCENTILES, Row, StepFigures, knee, paired

matplotlib.use("svg")

from matplotlib import pyplot

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Load test</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2327; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #d9dde0; }}
svg {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>Load test</h1>
<p>{what}.</p>
<p><strong>{verdict}</strong></p>
{figures}
<h2>By offered rate</h2>
<table>
<thead><tr><th>offered/s</th><th>answered/s</th><th>429</th><th>failed</th>{heads}</tr></thead>
<tbody>{rows}</tbody>
</table>
<p>Times are the client's, in milliseconds, of answers of status 200. A rate is kept up with if 95 % of it are answered
and nothing fails; the knee is the largest such rate with all smaller ones kept up with.</p>
</body>
</html>
"""


def write_report(path: Path, steps: list[StepFigures], rows: list[Row], title: str) -> Path:
    """Writes plots and a table; returns `path`."""
    steps = sorted(steps, key=lambda step: step.offered)
    figures = [_percentiles(steps), _answered(steps), _stages(steps)] if len(steps) > 1 else [_stages(steps)]
    lines = "".join(
        f"<tr><td>{step.offered}</td><td>{step.answered:.1f}</td><td>{step.refused}</td><td>{step.failed}</td>"
        + "".join(f"<td>{step.percentiles[at]:.1f}</td>" for at in PERCENTILES)
        + "</tr>"
        for step in steps
    )
    limit, pair = knee(steps), paired(rows)
    verdict = f"Knee: {limit.offered} requests per second." if limit else "Even the smallest rate was too high."
    if pair:
        verdict += (
            f" Under the same load, classify takes {pair[0]:.1f} ms and attribute {pair[1]:.1f} ms at the median: "
            f"{pair[1] / pair[0] - 1:+.1%}."
        )
    heads = "".join(f"<th>p{at}</th>" for at in PERCENTILES)
    page = _PAGE.format(what=html.escape(title), verdict=verdict, figures="".join(figures), heads=heads, rows=lines)
    path.write_text(page, encoding="utf-8")
    return path


def _percentiles(steps: list[StepFigures]) -> str:
    def draw(axes: pyplot.Axes) -> None:
        for at in PERCENTILES:
            axes.plot(
                [step.offered for step in steps], [step.percentiles[at] for step in steps], marker="o", label=f"p{at}"
            )
        axes.set(xlabel="offered, requests per second", ylabel="milliseconds", yscale="log")
        axes.legend()

    return _figure("Latency by percentile over load", draw)


def _answered(steps: list[StepFigures]) -> str:
    def draw(axes: pyplot.Axes) -> None:
        offered = [step.offered for step in steps]
        axes.plot(offered, offered, color="grey", linestyle=":", label="offered")
        axes.plot(offered, [step.answered for step in steps], marker="o", label="answered")
        axes.plot(offered, [step.refused / step.seconds for step in steps], marker="x", label="refused (429)")
        axes.set(xlabel="offered, requests per second", ylabel="a second")
        axes.legend()

    return _figure("Offered against answered", draw)


def _stages(steps: list[StepFigures]) -> str:
    names = list(dict.fromkeys(name for step in steps for name in step.stages))

    def draw(axes: pyplot.Axes) -> None:
        places = range(len(steps))
        bottom = [0.0] * len(steps)
        for name in names:
            heights = [step.stages.get(name, 0.0) for step in steps]
            axes.bar(places, heights, bottom=bottom, label=name)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.set_xticks(list(places), [str(step.offered) for step in steps])
        axes.set(xlabel="offered, requests per second", ylabel="mean milliseconds")
        axes.legend()

    return _figure("Where the time goes", draw)


def _figure(title: str, draw: Callable[[pyplot.Axes], None]) -> str:
    """A heading and an inline SVG, both with this title."""
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    draw(axes)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Title": title, "Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return f"<h2>{html.escape(title)}</h2>{text[text.index('<svg') :]}"
