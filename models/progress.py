"""How far long work is: a bar on a terminal; elsewhere, in a log or a pipe, a line now and then.

    measure: 450 of 1,966 images (23 %), 6.2 images/s, 1:12 elapsed, 4:04 left

The first line comes after ten seconds, later ones at least thirty seconds apart, the last when the work is done. Work
that is done within ten seconds prints none. Every command that may take longer tells it by this module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

FIRST, EVERY = 10.0, 30.0  # seconds until the first line; between two lines
Item = TypeVar("Item")


class Progress:
    """The tasks of one piece of work, one after the other; a context manager.

    Args:
        console: where to tell it.
        clock: seconds, for tests.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        is_screen = console.is_terminal and not console.is_dumb_terminal
        self.bars = Bars(*columns, console=console) if is_screen else None

    def __enter__(self) -> Progress:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def begin(self, what: str) -> None:
        """Begin work of unknown length: says what it is, at once, and that it goes on where there is a bar."""
        if self.bars is None:
            self.console.print(f"{what} …", highlight=False, markup=False, soft_wrap=True)
            return
        for old in [task.id for task in self.bars.tasks if task.total is None]:
            self.bars.remove_task(old)
        self.bars.add_task(what, total=None, unit="", note="")

    def task(self, what: str, total: int, unit: str = "", done: int = 0) -> Task:
        """Begin a task of `total` units, of which an earlier run has done `done`."""
        return Task(self, what, total, unit, done)


class Task:
    """One task; `Progress.task` begins it."""

    def __init__(self, progress: Progress, what: str, total: int, unit: str, done: int) -> None:
        self.what, self.total, self.unit, self.done, self.note = what, total, unit, done, ""
        self._progress, self._began_at = progress, done
        self._began = progress.clock()
        self._next = self._began + FIRST
        if (bars := progress.bars) is not None:
            self._bar = bars.add_task(what, total=total, completed=done, unit=unit, note="")

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """So many more units are done; `note`: what else there is to say, shown until the next one."""
        self.done += count
        self.note = self.note if note is None else note
        now = self._progress.clock()
        if self._progress.bars is not None:
            unit = " ".join(filter(None, [self.unit, self._speed(now)]))
            self._progress.bars.update(self._bar, completed=self.done, note=self.note, unit=unit)
            return
        has_spoken = self._next - self._began > FIRST
        is_last = self.done >= self.total and count > 0
        if now >= self._next or (is_last and has_spoken):
            self._next = now + EVERY
            self._progress.console.print(self._line(now), highlight=False, markup=False, soft_wrap=True)

    def _line(self, now: float) -> str:
        seconds, rate = now - self._began, self._rate(now)
        share = f" ({self.done / self.total:.0%})".replace("%", " %") if self.total else ""
        parts = [f"{self.done:,} of {self.total:,}{self._unit(' ')}{share}"]
        if rate > 0:
            parts.append(self._speed(now))
        parts.append(f"{_duration(seconds)} elapsed")
        if rate > 0 and self.done < self.total:
            parts.append(f"{_duration((self.total - self.done) / rate)} left")
        return f"{self.what}: {', '.join(parts)}{'; ' if self.note else ''}{self.note}"

    def _rate(self, now: float) -> float:
        seconds = now - self._began
        return (self.done - self._began_at) / seconds if seconds > 0 else 0.0

    def _speed(self, now: float) -> str:
        return f"{_short(self._rate(now))}{self._unit(' ')}/s"

    def _unit(self, before: str) -> str:
        return f"{before}{self.unit}" if self.unit else ""


def track(
    items: Iterable[Item], what: str, total: int, console: Console, unit: str = "", each: int = 1
) -> Generator[Item]:
    """The items, each worth `each` of the `total` units of a task; an item is done when the next one is asked for."""
    with Progress(console) as progress:
        task = progress.task(what, total, unit)
        for item in items:
            yield item
            task.advance(min(each, total - task.done))


def _short(rate: float) -> str:
    """Three digits at least, no more than one decimal: 0.42, 6.2, 1,234."""
    return f"{rate:.2f}" if rate < 1 else f"{rate:.1f}" if rate < 100 else f"{rate:,.0f}"


def _duration(seconds: float) -> str:
    """As 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
