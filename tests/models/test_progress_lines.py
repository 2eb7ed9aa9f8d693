"""How far long work is: through a pipe, with a clock that stands until it is told to go on; and on a terminal."""

import io
import os

import pytest
from rich.console import Console

from vitrine.models.progress import Progress, track


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def pipe():
    """(console that writes into a pipe, a function that returns the lines that have come out of it since)."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    with os.fdopen(write, "w", encoding="utf-8") as file, os.fdopen(read, "rb", buffering=0) as output:
        yield Console(file=file), lambda: (output.read() or b"").decode().splitlines()


def test_lines_come_after_ten_seconds_then_every_thirty_and_at_the_end(pipe):
    console, lines = pipe
    clock, seen = Clock(), {}
    with Progress(console, clock) as progress:
        task = progress.task("measure", 100, "images")
        for _ in range(100):
            clock.now += 1
            task.advance()
            if new := lines():
                seen[clock.now - 1000] = new
    assert seen == {
        10: ["measure: 10 of 100 images (10 %), 1.0 images/s, 0:10 elapsed, 1:30 left"],
        40: ["measure: 40 of 100 images (40 %), 1.0 images/s, 0:40 elapsed, 1:00 left"],
        70: ["measure: 70 of 100 images (70 %), 1.0 images/s, 1:10 elapsed, 0:30 left"],
        100: ["measure: 100 of 100 images (100 %), 1.0 images/s, 1:40 elapsed"],
    }


def test_the_end_is_told_whenever_a_line_was(pipe):
    console, lines = pipe
    clock = Clock()
    task = Progress(console, clock).task("cards", 2)
    clock.now += 11
    task.advance()
    clock.now += 1
    task.advance()
    assert lines() == [
        "cards: 1 of 2 (50 %), 0.09/s, 0:11 elapsed, 0:11 left",
        "cards: 2 of 2 (100 %), 0.17/s, 0:12 elapsed",
    ]


def test_short_work_says_nothing(pipe):
    console, lines = pipe
    clock = Clock()
    task = Progress(console, clock).task("survey", 5)
    for _ in range(5):
        clock.now += 1.9
        task.advance()
    assert lines() == []


def test_what_an_earlier_run_did_does_not_count_towards_the_rate(pipe):
    console, lines = pipe
    clock = Clock()
    task = Progress(console, clock).task("bulk", 9000, "images", done=5000)
    clock.now += 4000
    task.advance(2000, note="[3] broken")
    assert lines() == ["bulk: 7,000 of 9,000 images (78 %), 0.50 images/s, 1:06:40 elapsed, 1:06:40 left; [3] broken"]


def test_work_of_unknown_length_says_that_it_has_begun(pipe):
    console, lines = pipe
    Progress(console).begin("exporting the graphs")
    assert lines() == ["exporting the graphs …"]


def test_items_are_tracked_as_they_are_asked_for(monkeypatch, pipe):
    console, lines = pipe
    clock = Clock()
    monkeypatch.setattr(Progress.__init__, "__defaults__", (clock,))
    for item in track("abc", "read", 25, console, "images", each=10):
        clock.now += 10
        told = ["read: 10 of 25 images (40 %), 1.0 images/s, 0:10 elapsed, 0:15 left"]
        assert lines() == (told if item == "b" else [])
    assert lines() == ["read: 25 of 25 images (100 %), 0.83 images/s, 0:30 elapsed"]


def test_a_terminal_has_a_bar_and_no_lines():
    output, clock = io.StringIO(), Clock()
    console = Console(file=output, force_terminal=True, width=120)
    with Progress(console, clock) as progress:
        task = progress.task("measure", 4, "images")
        clock.now += 100
        task.advance(3, note="[/] 2 broken")
    assert "images 0.03 images/s [/] 2 broken" in output.getvalue()
    assert "elapsed" not in output.getvalue()
