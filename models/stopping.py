"""SIGTERM and Ctrl-C: the first ends a command in order, a second one at once.

`signals_raise` is for the program: the first signal raises `Stopped` wherever the work is, and everything that cleans
up after an error cleans up. `noted_signals` is for work that can end at a better moment, a training run between two
steps. Both change nothing outside the main thread, which alone may set handlers, in processes that are forked, and of a
signal that the process was started to ignore, as shells start what runs in the background.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN = "no unfinished files are left; run the same command to start again"


class Stopped(KeyboardInterrupt):
    """A signal told the process to stop. Like Ctrl-C it is no `Exception`, so nothing takes it for an error.

    `advice` says what is left and what to do.
    """

    def __init__(self, number: int, advice: str = "") -> None:
        super().__init__(number)
        self.number, self.advice = number, advice

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}: {self.advice or _AGAIN}"

    @property
    def status(self) -> int:
        """The exit status, as shells have it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.number


class Noted:
    """The first signal that came, if one did; `noted_signals` makes it."""

    number: int | None = None


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within the block the first signal raises `Stopped`."""

    def stop(number: int, frame: FrameType | None) -> None:
        _by_default()
        raise Stopped(number)

    with _handling(stop):
        yield


@contextmanager
def noted_signals() -> Iterator[Noted]:
    """Within the block the first signal is noted, and a second one ends the process."""
    noted = Noted()

    def note(number: int, frame: FrameType | None) -> None:
        noted.number = number
        _by_default()

    with _handling(note):
        yield noted


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """What a `Stopped` that leaves the block says of what is left and what to do, if nobody said it before."""
    try:
        yield
    except Stopped as stopped:
        stopped.advice = stopped.advice or advice
        raise


def heed_the_second_signal_alone() -> None:
    """For a process that works for another one, which is told to stop by the same signals (a terminal, `timeout` and
    cluster schedulers send them to all processes) and still wants the work in hand."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process, before = os.getpid(), {number: signal.getsignal(number) for number in _heeded()}

    def ours(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            handler(number, frame)
        else:  # forked: as in any other process
            _by_default()
            os.kill(os.getpid(), number)

    for number in before:
        signal.signal(number, ours)
    try:
        yield
    finally:
        for number, old in before.items():
            if signal.getsignal(number) in (ours, signal.SIG_DFL):  # else the block set one that is to stay
                signal.signal(number, _known(old))


def _by_default() -> None:
    for number in _heeded():
        signal.signal(number, signal.SIG_DFL)


def _heeded() -> list[signal.Signals]:
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _known(handler: Any) -> Any:
    """None stands for a handler that was not set from Python and cannot be set again."""
    return signal.SIG_DFL if handler is None else handler
