"""The processes of `bentoml serve`, one parent and workers that share its socket, and the signals between them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil

WORKER_MODULE = "_bentoml_impl.worker.service"  # BentoML starts a worker with python -m WORKER_MODULE
PARENT_PID_VARIABLE = "_VITRINE_PARENT"  # environment variable: process id of the `vitrine serve` behind this worker
LATE = 75  # exit code of a worker that had to be ended: it was stuck
POLL_SECONDS = 1.0


def worker_processes(parent: int) -> list[psutil.Process]:
    """The workers of a `bentoml serve` that can be signalled."""
    processes = []
    for process in psutil.Process(parent).children():
        with suppress(psutil.Error):  # it has ended meanwhile, or is a zombie
            if WORKER_MODULE in process.cmdline():
                processes.append(process)
    return processes


def is_worker() -> bool:
    """Whether this process is a worker of a `bentoml serve`."""
    return WORKER_MODULE in psutil.Process().cmdline()


def signal_others(number: signal.Signals) -> None:
    """Send a signal to this worker's siblings, if it is a worker."""
    with suppress(psutil.Error):
        if is_worker():
            for process in worker_processes(os.getppid()):
                if process.pid != os.getpid():
                    process.send_signal(number)


@contextmanager
def on_signal(number: signal.Signals, action: Callable[[], Awaitable[Any]]) -> Iterator[None]:
    """Run `action` in the event loop on every such signal. Only a process's main thread receives signals; in an event
    loop elsewhere (in a test) this does nothing."""
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
def end_in_time(seconds: float) -> Iterator[None]:
    """End this process `seconds` after its first SIGTERM or SIGINT, if the server has not ended it before.

    The server waits for every request in hand, and Python for every thread: one that is stuck would keep the process
    for ever. Call this where the server's own handlers are in place, which are called as before. Only a process's main
    thread has signal handlers; elsewhere (in a test) this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in numbers}
    began = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal began
        if not began:
            began = True
            _end_after(seconds)
        handler = previous[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        elif handler is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_after(seconds: float) -> None:
    def end() -> None:
        print(
            f"error: a worker was still running {seconds:g} s after the signal to stop; it has been killed",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LATE)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    # The kernel's own timer, for a thread that lets no other one run: the action of SIGALRM is to end the process.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)


@contextmanager
def parent_pid_in_environment() -> Iterator[None]:
    """Pass this process's id to processes started meanwhile, so that they know their parent even if it has died."""
    os.environ[PARENT_PID_VARIABLE] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[
            PARENT_PID_VARIABLE
        ]  # workers of a `bentoml serve` that this process starts later have another parent


@contextmanager
def exit_with_parent() -> Iterator[None]:
    """End this worker of `vitrine serve` by SIGTERM once its parent has died without stopping it.

    It would no longer be supervised, and would block the port for the next server.
    """
    if PARENT_PID_VARIABLE not in os.environ:
        yield
        return

    async def watch() -> None:
        while os.getppid() == int(os.environ[PARENT_PID_VARIABLE]):
            await asyncio.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watcher.cancel()
