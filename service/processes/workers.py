"""The processes of `bentoml serve`: one parent, and workers that share its socket. Signals among them."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

SCRIPT = "_bentoml_impl.worker.service"  # what BentoML starts a worker with: python -m SCRIPT
PARENT = "_VITRINE_PARENT"  # environment variable: the process id of the `vitrine serve` that started this worker
LOOK_SECONDS = 1.0


def of(parent: int) -> list[psutil.Process]:
    """The workers of a `bentoml serve` that can be signalled."""
    found = []
    for process in psutil.Process(parent).children():
        with suppress(psutil.Error):  # it ended meanwhile, or is a zombie
            if SCRIPT in process.cmdline():
                found.append(process)
    return found


def signal_others(number: signal.Signals) -> None:
    """Send a signal to this worker's siblings, if it is a worker."""
    with suppress(psutil.Error):
        if SCRIPT in psutil.Process().cmdline():
            for process in of(os.getppid()):
                if process.pid != os.getpid():
                    process.send_signal(number)


@contextmanager
def on_signal(number: signal.Signals, action: Callable[[], Awaitable[Any]]) -> Iterator[None]:
    """Run `action` in the event loop whenever the signal comes. Only a process' main thread is told of signals; an
    event loop elsewhere (a test's) goes without."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    running: set[asyncio.Future[Any]] = set()
    loop = asyncio.get_running_loop()

    def start() -> None:
        task = asyncio.ensure_future(action())
        running.add(task)  # the loop itself keeps no reference
        task.add_done_callback(running.discard)

    loop.add_signal_handler(number, start)
    try:
        yield
    finally:
        loop.remove_signal_handler(number)


@contextmanager
def told_their_parent() -> Iterator[None]:
    """What is started meanwhile knows that this process is its parent, even where it finds it dead already."""
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[PARENT]  # a `bentoml serve` that this process starts later has workers of another parent


@contextmanager
def end_with_parent() -> Iterator[None]:
    """End this worker of `vitrine serve`, as SIGTERM would, once its parent has died without telling it to.

    Nobody would look after it any more, and it would keep the port from the server that is started next.
    """
    if PARENT not in os.environ:
        yield
        return

    async def watch() -> None:
        while os.getppid() == int(os.environ[PARENT]):
            await asyncio.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    watching = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watching.cancel()
