"""From the rows that the users wrote (`locustfile.py`) to figures: by offered rate, by stage, by pair."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

KEPT_UP = 0.95  # share of what is offered that must be answered, for a rate to be within the knee
SETTLING = 3.0  # seconds at the start of every step that are ignored
PERCENTILES = (50, 90, 95, 99)
OTHER = "way and waiting"  # the client's time that no stage of the service accounts for


@dataclass(frozen=True)
class Row:
    """One answer."""

    seconds: float
    offered: int  # requests a second
    name: str
    status: int
    milliseconds: float
    stages: dict[str, float]


@dataclass(frozen=True)
class StepFigures:
    """Figures at one offered rate. Times are milliseconds of the requests that were answered with 200."""

    offered: int
    seconds: float
    answered: float  # answers of status 200, a second
    refused: int  # 429
    failed: int  # anything else
    percentiles: dict[int, float]
    stages: dict[str, float]  # means

    @property
    def keeps_up(self) -> bool:
        """Whether the service answered what was offered, except for a few that arrived together and were refused."""
        return not self.failed and self.answered >= KEPT_UP * self.offered


def read_rows(file: Path) -> list[Row]:
    """Every answer, in the order in which the requests were sent."""
    rows = []
    with file.open(newline="", encoding="utf-8") as opened:
        for line in csv.DictReader(opened):
            columns = ("seconds", "offered", "name", "status", "milliseconds")
            seconds, offered, name, status, took = (line.pop(column) for column in columns)
            stages = {stage: float(value) for stage, value in line.items() if value}
            rows.append(Row(float(seconds), int(offered), name, int(status), float(took), stages))
    return sorted(rows, key=lambda row: row.seconds)


def by_step(rows: list[Row]) -> list[StepFigures]:
    """Figures of every stretch of one offered rate, in the order of the run."""
    stretches: list[list[Row]] = []
    for row in rows:
        if not stretches or stretches[-1][-1].offered != row.offered:
            stretches.append([])
        stretches[-1].append(row)
    return [_figures(stretch) for stretch in stretches if stretch[-1].seconds - stretch[0].seconds > SETTLING]


def knee(steps: list[StepFigures]) -> StepFigures | None:
    """The largest rate up to which the service keeps up with every rate; None if it fails at the smallest."""
    largest = None
    for step in sorted(steps, key=lambda step: step.offered):
        if not step.keeps_up:
            break
        largest = step
    return largest


def paired(rows: list[Row]) -> tuple[float, float] | None:
    """Medians (classify, attribute) of answers under the same load, in milliseconds; None without both."""
    times: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.status == 200:
            times[row.name].append(row.milliseconds)
    pair = times.get("/v1/classify"), times.get("/v1/attribute")
    return (float(np.median(pair[0])), float(np.median(pair[1]))) if pair[0] and pair[1] else None


def _figures(stretch: list[Row]) -> StepFigures:
    begin = stretch[0].seconds + SETTLING
    settled = [row for row in stretch if row.seconds >= begin]
    seconds = max(1.0, stretch[-1].seconds - begin)
    successful = [row for row in settled if row.status == 200]
    times = np.array([row.milliseconds for row in successful]) if successful else np.array([np.nan])
    refused = sum(row.status == 429 for row in settled)
    return StepFigures(
        offered=stretch[0].offered,
        seconds=seconds,
        answered=len(successful) / seconds,
        refused=refused,
        failed=len(settled) - len(successful) - refused,
        percentiles={at: float(np.percentile(times, at)) for at in PERCENTILES},
        stages=_stages(successful),
    )


def _stages(successful: list[Row]) -> dict[str, float]:
    """Mean milliseconds of each stage, and the rest of the client's time."""
    sums: dict[str, float] = defaultdict(float)
    for row in successful:
        for stage, took in row.stages.items():
            sums[stage] += took
        sums[OTHER] += max(0.0, row.milliseconds - sum(row.stages.values()))
    return {stage: total / len(successful) for stage, total in sums.items()}
