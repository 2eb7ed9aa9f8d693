"""`vitrine serve`: BentoML's server, whose workers are looked after more closely than BentoML does.

BentoML looks every ten seconds whether a worker has died, and on SIGHUP puts new workers in the place of the old
whether the new bundle is any good or not. Here a dead worker is replaced at once, and SIGHUP is handed to the workers,
which take over a new bundle only once it is loaded (`service.answers.reload`).
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import bentoml
import psutil
from zmq import ZMQError

import vitrine
from vitrine.models.errors import VitrineError
from vitrine.service.processes import workers

# Where the package lies. BentoML puts a worker's directory first on its path: that of the caller may well have a
# `vitrine.py` of its own.
PLACE = str(Path(vitrine.__file__).parents[1])
LOOK_SECONDS = 0.25
ATTEMPTS = 5


class ServeError(VitrineError):
    """The server cannot start."""


def serve(host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are answered first. Raises `ServeError`."""
    _check_address(host, port)
    failures: list[BaseException | None] = []
    threading.excepthook = lambda thrown: failures.append(thrown.exc_value)
    with workers.told_their_parent():
        arbiter = _start(host, port, failures)
        signal.signal(signal.SIGHUP, lambda *_: _reload())  # in place of BentoML's
        while arbiter._thread.is_alive():
            time.sleep(LOOK_SECONDS)
            if _has_lost_one(arbiter):
                with suppress(RuntimeError):  # it is ending
                    arbiter.loop.add_callback(arbiter.manage_watchers)
    if failures:
        raise ServeError(f"the server came to an end: {failures[0]}") from failures[0]


def _start(host: str, port: int, failures: list[BaseException | None]) -> Any:
    """BentoML's arbiter, once it runs, or has failed for good.

    For its own ends it looks for free ports some moments before it takes them; one may be gone by then.
    """
    for _ in range(ATTEMPTS):
        failures.clear()
        server: Any = bentoml.serve(
            "vitrine.service.app:Vitrine", working_dir=PLACE, host=host, port=port, blocking=False
        )
        arbiter = server.arbiter
        while not arbiter.running and arbiter._thread.is_alive():
            time.sleep(LOOK_SECONDS)
        if not (failures and isinstance(failures[0], ZMQError) and failures[0].errno == errno.EADDRINUSE):
            break
        arbiter.sockets.close_all()
    return arbiter


def _check_address(host: str, port: int) -> None:
    """BentoML would say so in a traceback, from a thread."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from error


def _reload() -> None:
    for process in workers.of(os.getpid()):
        process.send_signal(signal.SIGHUP)


def _has_lost_one(arbiter: Any) -> bool:
    for watcher in arbiter.iter_watchers():
        for pid in list(watcher.processes):
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    continue
            return True
    return False
