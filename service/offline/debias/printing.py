"""What was found, as it is printed."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrine.models.bootstrap import Estimate
from vitrine.models.files.names import printable
from vitrine.models.tables import show
from vitrine.service.offline.debias.report import Report

PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
SHOWN_EXEMPLARS = 3
SHOWN_WRITERS = 5


def print_report(report: Report, console: Console) -> None:
    """Ranking, trials, and accuracies by group before and after; then what could not be done."""
    console.print(
        f"{report.finding_images:,} images to find edits, {report.held_out_images:,} held out to measure them; groups "
        f"by {report.groups_by}: {', '.join(report.groups)}",
        **PLAIN,
    )
    console.print(f"labels: {', '.join(report.labels)}; templates: {'; '.join(report.templates)}", **PLAIN)
    if report.cue:
        console.print(f"cue: {'; '.join(report.cue)}; other: {'; '.join(report.others)}", **PLAIN)
    show(_ranking(report), console)
    if report.directions:
        show(_directions(report), console)
    if report.trials:
        show(_trials(report), console)
    show(_methods(report), console)
    show(_by_group(report), console)
    if report.proposed is None:
        console.print(
            "no edit was better than no edit on the finding half, so none is proposed", style="yellow", **PLAIN
        )
    else:
        console.print(f"proposed: {report.proposed}", style="green", **PLAIN)
    for line in (
        *(f"not tried: {what}: {why}" for what, why in report.refused.items()),
        *(f"not compared: {line}" for line in report.left_out),
        *(f"not used: {line}" for line in report.unreadable[:3]),
    ):
        console.print(line, style="yellow", **PLAIN)
    console.print(f"{report.seconds:.0f} s", **PLAIN)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number < left else "right")
    return table


def _ranking(report: Report) -> Table:
    table = _table(
        "features that distinguish the groups within a label (finding half)",
        "feature",
        "label of its card",
        "exemplars",
        "group",
        "logits in the group",
        "with the label",
        "effect size",
        left=4,
    )
    for feature in report.ranking:
        exemplars = ", ".join(map(printable, feature.exemplars[:SHOWN_EXEMPLARS]))
        table.add_row(
            f"{feature.layer}/{feature.index}",
            Text(feature.label or ""),
            Text(exemplars),
            Text(printable(feature.group)),
            interval(feature.logits, 1, 3),
            f"{feature.label_logits:+.3f}",
            f"{feature.size:+.2f}",
        )
    return table


def _directions(report: Report) -> Table:
    table = _table(
        "directions in which a group differs, and the features that write along them (finding half)",
        "group",
        "written by",
        "by features",
        "of",
        "logits in the group",
        left=2,
    )
    for direction in report.directions:
        written = ", ".join(f"{one.layer}/{one.index} {one.along:+.2f}" for one in direction.written_by[:SHOWN_WRITERS])
        figures = f"{direction.by_features:+.2f}", f"{direction.along:.2f}", interval(direction.logits, 1, 3)
        table.add_row(Text(printable(direction.group)), written, *figures)
    return table


def _trials(report: Report) -> Table:
    rounds = ", ".join(map(str, report.tried))
    title = f"the best edits on the complete finding half (number tried in each round: {rounds})"
    table = _table(title, "op", "tokens", "features", "mode", "changes the lead by", "worst group", "average", left=2)
    for trial in sorted(report.trials, key=lambda trial: -trial.worst)[:10]:
        moves = "" if trial.moves_logit is None else f"{trial.moves_logit:.2f}"
        shares = f"{trial.worst:.1%}", f"{trial.average:.1%}"
        op = f"{trial.op}, {trial.shift:+.1f}" if trial.shift else trial.op
        table.add_row(op, trial.tokens, str(trial.features), trial.mode, moves, *shares)
    return table


def _methods(report: Report) -> Table:
    table = _table("held-out half", "method", "worst group, %", "change, points", "average, %", "change, points")
    for method in report.methods:
        change = method.change
        table.add_row(
            Text(method.name),
            interval(method.accuracy.worst),
            "" if change is None else interval(change.worst, signed=True),
            interval(method.accuracy.average),
            "" if change is None else interval(change.average, signed=True),
        )
    return table


def _by_group(report: Report) -> Table:
    names = [method.name for method in report.methods]
    table = _table("by group, %", "label", "group", "images", *names, left=2)
    for number, group in enumerate(report.methods[0].accuracy.groups):
        figures = [f"{100 * method.accuracy.groups[number].accuracy.value:.1f}" for method in report.methods]
        table.add_row(Text(group.label), Text(group.group), f"{group.images:,}", *figures)
    return table


def interval(estimate: Estimate, scale: float = 100, places: int = 1, *, signed: bool = False) -> str:
    """A figure and its interval: "71.2 (65.0 to 77.1)"."""
    sign = "+" if signed else ""
    value, low, high = (f"{scale * part:{sign}.{places}f}" for part in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"
