"""How a worker's start went, told to `vitrine serve`, which goes on replacing workers, or stops with a sentence."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from vitrine.service.processes.workers import is_worker

SOCKET_VARIABLE = "_VITRINE_REPORTS"  # environment variable: file descriptor of a socket that takes reports
UNUSABLE = 78  # exit code of a worker that cannot start, for a reason that the next one would meet, too
MAX_CHARACTERS = 4_000  # of a reason


class Report(NamedTuple):
    pid: int
    problem: str | None  # why it cannot start; None: it is ready


class Reports:
    """The parent's end: the reports that have come in."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.setblocking(False)

    def read(self) -> Iterator[Report]:
        """Those since the last call."""
        with suppress(BlockingIOError):
            while True:
                yield Report(*json.loads(self._connection.recv(2**16)))


@contextmanager
def reports_in_environment() -> Iterator[Reports]:
    """Take reports from processes started meanwhile, which inherit the socket."""
    ours, theirs = socket.socketpair(type=socket.SOCK_DGRAM)
    with ours, theirs:
        theirs.set_inheritable(True)
        os.environ[SOCKET_VARIABLE] = str(theirs.fileno())
        try:
            yield Reports(ours)
        finally:
            del os.environ[SOCKET_VARIABLE]


@contextmanager
def reported_start(*errors: type[Exception]) -> Iterator[None]:
    """Report how a worker's start goes. One of `errors`, which the user has to mend, ends the worker with `UNUSABLE`
    and one sentence, without a traceback. In any other process this does nothing."""
    try:
        yield
    except errors as error:
        if not is_worker():
            raise
        if not _report(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(UNUSABLE)  # nothing has been admitted yet that would have to be answered
    if is_worker():
        _report(None)


def _report(problem: str | None) -> bool:
    """Whether there is a `vitrine serve` that takes the report."""
    if SOCKET_VARIABLE not in os.environ:
        return False
    message = json.dumps(Report(os.getpid(), problem and problem[:MAX_CHARACTERS])).encode()
    with socket.socket(fileno=os.dup(int(os.environ[SOCKET_VARIABLE]))) as connection:
        connection.setblocking(False)
        try:
            connection.send(message)
        except OSError:  # the parent has died, or reads nothing
            return False
    return True
