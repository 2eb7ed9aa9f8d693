"""The processes of `bentoml serve`, one parent and workers that share its socket, and the signals between them."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

WORKER_MODULE = "_bentoml_impl.worker.service"  # BentoML starts a worker with python -m WORKER_MODULE
PARENT_PID_VARIABLE = "_VITRINE_PARENT"  # environment variable: process id of the `vitrine serve` behind this worker
POLL_SECONDS = 1.0


def worker_processes(parent: int) -> list[psutil.Process]:
    """The workers of a `bentoml serve` that can be signalled."""
    processes = []
    for process in psutil.Process(parent).children():
        with suppress(psutil.Error):  # it has ended meanwhile, or is a zombie
            if WORKER_MODULE in process.cmdline():
                processes.append(process)
    return processes


def signal_others(number: signal.Signals) -> None:
    """Send a signal to this worker's siblings, if it is a worker."""
    with suppress(psutil.Error):
        if WORKER_MODULE in psutil.Process().cmdline():
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
