"""`vitrine serve`: BentoML's server, with closer supervision of its workers.

BentoML checks every ten seconds whether a worker has died, and on SIGHUP replaces all workers even if the new bundle
is unusable. Here a dead worker is replaced at once, and SIGHUP is forwarded to the workers, which switch to a new
bundle only once it is loaded (`service.answers.reload`).
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import bentoml
import psutil
from zmq import ZMQError

from vitrine.models.errors import VitrineError
from vitrine.service.processes import metrics_folder, workers
from vitrine.service.processes.import_path import PACKAGE_PARENT

POLL_SECONDS = 0.25
MAX_ATTEMPTS = 5


class ServeError(VitrineError):
    """The server cannot start."""


def serve(host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are answered first. Raises `ServeError`."""
    _check_address(host, port)
    failures: list[BaseException | None] = []
    metrics_folder.use_own_folder()
    threading.excepthook = lambda hook_args: failures.append(hook_args.exc_value)
    with workers.parent_pid_in_environment():
        arbiter = _start(host, port, failures)
        signal.signal(signal.SIGHUP, lambda *_: _reload())  # replaces BentoML's handler
        while arbiter._thread.is_alive():
            time.sleep(POLL_SECONDS)
            if _has_dead_worker(arbiter):
                with suppress(RuntimeError):  # the loop is shutting down
                    arbiter.loop.add_callback(arbiter.manage_watchers)
    if failures:
        raise ServeError(f"the server came to an end: {failures[0]}") from failures[0]


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


def _has_dead_worker(arbiter: Any) -> bool:
    for watcher in arbiter.iter_watchers():
        for pid in list(watcher.processes):
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    continue
            return True
    return False
