"""`vitrine serve`: BentoML's server, with closer supervision of its workers.

BentoML checks every ten seconds whether a worker has died, and replaces it for ever, whatever it died of; on SIGHUP it
replaces all workers even if the new bundle is unusable; on SIGTERM it waits for its workers for a day. Here a dead
worker is replaced at once, unless several have died in a row before they were ready; workers that say why they cannot
start end the server, with their reason; SIGHUP is forwarded to the workers, which switch to a new bundle only once it
is loaded (`service.answers.reload`); and what has not ended in time after SIGTERM is killed.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import bentoml
import psutil
from circus.exc import ConflictError
from zmq import ZMQError

from vitrine.models.errors import VitrineError
from vitrine.service.processes import metrics_folder, workers
from vitrine.service.processes.import_path import PACKAGE_PARENT
from vitrine.service.processes.reports import Reports, reports_in_environment

POLL_SECONDS = 0.25
MAX_ATTEMPTS = 5
MAX_EARLY_DEATHS = 3  # in a row that are made good at once
KILL_AFTER, EXIT_AFTER = 1.5, 3.0  # seconds after `shutdown_seconds`: workers are killed, the server ends itself
# Of the workers' C library. By default it keeps what large bodies and answers have left free, in pieces, in an arena
# for each thread: under such requests a worker grew from round to round (loadtests/RESULTS.md).
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**20),
}


class ServeError(VitrineError):
    """The server cannot start."""


def serve(host: str, port: int, shutdown_seconds: float = 25.0) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are answered first, for `shutdown_seconds`. Raises
    `ServeError`."""
    _check_address(host, port)
    failures: list[BaseException | None] = []
    metrics_folder.use_own_folder()
    threading.excepthook = lambda hook_args: failures.append(hook_args.exc_value)
    with workers.parent_pid_in_environment(), _allocator_in_environment(), reports_in_environment() as reports:
        arbiter = _start(host, port, failures)
        problem = _Supervision(arbiter, reports, shutdown_seconds).run()
    if problem:
        raise ServeError(problem)
    if failures:
        raise ServeError(f"the server stopped: {failures[0]}") from failures[0]


@contextmanager
def _allocator_in_environment() -> Iterator[None]:
    """Pass `ALLOCATOR` to processes started meanwhile, where the operator has not set it otherwise."""
    new = {name: value for name, value in ALLOCATOR.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


class _Supervision:
    """Looks after the workers of a running arbiter."""

    def __init__(self, arbiter: Any, reports: Reports, shutdown_seconds: float) -> None:
        self._arbiter, self._reports, self._shutdown_seconds = arbiter, reports, shutdown_seconds
        self._ready: set[int] = set()  # process ids of workers that became ready
        self._dead: set[int] = set()
        self._early_deaths = 0  # since a worker was ready
        self._problem: str | None = None
        self._stop_asked: float | None = None  # when
        self._quit = signal.getsignal(signal.SIGTERM)  # BentoML's handler
        for watcher in arbiter.iter_watchers():
            watcher.graceful_timeout = shutdown_seconds + KILL_AFTER
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._ask_to_stop())
        signal.signal(signal.SIGHUP, lambda *_: _reload())

    def run(self) -> str | None:
        """Until the server has ended; why, if its workers could not start."""
        while self._arbiter._thread.is_alive():
            time.sleep(POLL_SECONDS)
            self._read_reports()
            if self._stop_asked is not None:
                self._stop(time.monotonic() - self._stop_asked)
            elif dead := _dead_workers(self._arbiter):
                self._replace(dead)
        self._read_reports()  # BentoML ends by itself in a container, once its last worker has
        return self._problem

    def _ask_to_stop(self) -> None:
        if self._stop_asked is None:
            self._stop_asked = time.monotonic()

    def _stop(self, seconds: float) -> None:
        """Tell BentoML to stop, until it does (it ignores that while it starts a worker). seconds: since it was asked
        for."""
        if not self._arbiter._stopping and callable(self._quit):
            self._quit(signal.SIGTERM, None)
        if seconds > self._shutdown_seconds + EXIT_AFTER:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            print(
                f"error: the server was still running {seconds:.0f} s after the signal to stop; it has been killed",
                file=sys.stderr,
            )
            sys.stderr.flush()
            os._exit(1)

    def _read_reports(self) -> None:
        for pid, problem in self._reports.read():
            if problem is None:
                self._ready.add(pid)
                self._early_deaths = 0
            elif any(psutil.pid_exists(other) for other in self._ready - self._dead):
                _log(f"a worker cannot start, the others continue: {problem}")
            else:
                self._problem = problem
                self._ask_to_stop()

    def _replace(self, dead: set[int]) -> None:
        """Have BentoML replace dead workers at once; it does so by itself every ten seconds, which is soon enough where
        one after the other dies."""
        new = dead - self._dead
        self._dead |= new
        self._early_deaths += len(new - self._ready)
        if self._early_deaths < MAX_EARLY_DEATHS:
            with suppress(RuntimeError):  # the loop is shutting down
                self._arbiter.loop.add_callback(_manage, self._arbiter)
        elif new:
            _log(
                f"{self._early_deaths} workers in a row died before they were ready; the next one starts in a few "
                "seconds"
            )


def _manage(arbiter: Any) -> Any:
    with suppress(ConflictError):  # it starts or stops something, and will be asked again
        return arbiter.manage_watchers()


def _log(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def _start(host: str, port: int, failures: list[BaseException | None]) -> Any:
    """BentoML's arbiter, once it is running or has failed for good.

    It picks free ports for internal use some moments before it binds them; if one was taken meanwhile, start again.
    """
    for _ in range(MAX_ATTEMPTS):
        failures.clear()
        server: Any = bentoml.serve(
            "vitrine.service.app:Vitrine", working_dir=str(PACKAGE_PARENT), host=host, port=port, blocking=False
        )
        arbiter = server.arbiter
        while not arbiter.running and arbiter._thread.is_alive():
            time.sleep(POLL_SECONDS)
        if not (failures and isinstance(failures[0], ZMQError) and failures[0].errno == errno.EADDRINUSE):
            break
        arbiter.sockets.close_all()
    return arbiter


def _check_address(host: str, port: int) -> None:
    """Check the address first: BentoML would report the error as a traceback from a thread."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from error


def _reload() -> None:
    for process in workers.worker_processes(os.getpid()):
        process.send_signal(signal.SIGHUP)


def _dead_workers(arbiter: Any) -> set[int]:
    """Process ids of workers that have ended and have not been replaced."""
    dead = set()
    for watcher in arbiter.iter_watchers():
        for pid in list(watcher.processes):
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    continue
            dead.add(pid)
    return dead
