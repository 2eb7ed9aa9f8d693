"""All connections of a worker: how many there may be, which one gives way, and what has taken too long.

A connection takes a file descriptor. Where there is none left the system refuses connections without a word to anybody,
so no more are let in than half of what is free: the other half is for whatever else the process opens. One timer, not
one a connection, looks at all of them.
"""

from __future__ import annotations

import asyncio
import resource
import time
from typing import Protocol

import psutil

from vitrine.service.http.budget import Budget
from vitrine.service.http.pace import Pace
from vitrine.service.operations import metrics
from vitrine.service.operations.logs import logger
from vitrine.service.operations.settings import Settings

TURNED_AWAY = 16  # connections over the limit that are being told so; further ones are closed without an answer
RESERVED_DESCRIPTORS = TURNED_AWAY + 8  # the rest is for a reload, which opens files beside those in use
FEWEST = 4  # connections, however few descriptors there are
LOG_SECONDS = 10.0  # a line for each reason, at most


class Entrant(Protocol):
    """What the door needs of a `Connection`."""

    loop: asyncio.AbstractEventLoop

    def check(self) -> int:
        """End what has taken too long. Returns the number of bytes that the client has not read yet."""

    def give_way(self) -> None:
        """Close, while no request is in hand, for the sake of a new connection."""


class Door:
    """Use by one event loop. `settings` gives the limits; the timer runs while there are connections."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.budget = Budget(settings.max_bytes_in_hand)
        self.pace = Pace()
        self.linger_bytes = 16 * settings.max_body_bytes
        self._limit = 0  # not known before the first connection: the bundle's files are open then
        self._connections: set[Entrant] = set()  # until they are lost
        self._admitted: set[Entrant] = set()
        self._waiting: dict[Entrant, None] = {}  # those without a request in hand, longest first
        self._timer: asyncio.TimerHandle | None = None
        shortest = min(settings.header_seconds, settings.keep_alive_seconds, settings.send_seconds)
        self._interval = max(0.05, min(1.0, shortest / 4))
        self._logged: dict[str, tuple[float, int]] = {}  # by reason: when last, and how many since

    def enter(self, connection: Entrant) -> bool:
        """Whether the connection is admitted. The longest waiting one is closed for it where there are too many."""
        if not self._limit:
            self._limit = _connection_limit(self.settings.max_connections)
            metrics.CONNECTIONS_LIMIT.set(self._limit)
            metrics.BYTES_IN_HAND_LIMIT.set(self.budget.limit)
        self._connections.add(connection)
        if self._timer is None:
            self._timer = connection.loop.call_later(self._interval, self._check)
        if len(self._admitted) >= self._limit:
            longest = next(iter(self._waiting), None)
            if longest is None:
                return False
            self._forget(longest)
            longest.give_way()
            self.refused(
                "too_many", f"closed an idle connection to accept a new one: the limit of {self._limit:,} is reached"
            )
        self._admitted.add(connection)
        metrics.CONNECTIONS.set(len(self._admitted))
        return True

    @property
    def may_answer(self) -> bool:
        """Whether there is a descriptor for telling one more connection that there are too many."""
        return len(self._connections) - len(self._admitted) <= TURNED_AWAY

    def leave(self, connection: Entrant) -> None:
        """The connection is lost."""
        self._connections.discard(connection)
        self._forget(connection)
        metrics.CONNECTIONS.set(len(self._admitted))

    def waits(self, connection: Entrant, waits: bool) -> None:
        """Whether the connection waits for a request: it may then be closed for another."""
        self._waiting.pop(connection, None)
        if waits and connection in self._admitted:
            self._waiting[connection] = None

    def refused(self, reason: str, message: str) -> None:
        """Count a refusal, and log it unless the same was logged some seconds ago: a flood must not fill the log."""
        metrics.CONNECTIONS_REFUSED.labels(reason).inc()
        now = time.monotonic()
        last, unlogged = self._logged.get(reason, (-LOG_SECONDS, 0))
        if now - last < LOG_SECONDS:
            self._logged[reason] = last, unlogged + 1
            return
        self._logged[reason] = now, 0
        more = f" ({unlogged:,} more since the last line of this kind)" if unlogged else ""
        logger.warning("connection refused, %s: %s%s", reason, message, more)

    def _forget(self, connection: Entrant) -> None:
        self._waiting.pop(connection, None)
        self._admitted.discard(connection)

    def _check(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._interval, self._check) if self._connections else None
        self.budget.unsent = sum(connection.check() for connection in list(self._connections))
        metrics.BYTES_IN_HAND.set(self.budget.held + self.budget.unsent)


def _connection_limit(wanted: int) -> int:
    """As many connections as the file descriptors of this process are enough for, `wanted` at most.

    Raises the soft limit as far as it is needed and allowed.
    """
    in_use = psutil.Process().num_fds() + RESERVED_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (2**31 if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard))
    needed = in_use + 2 * wanted
    if soft < min(needed, hard):
        soft = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    limit = min(wanted, max(FEWEST, (soft - in_use) // 2))
    if limit < wanted:
        logger.warning(
            "only %d connections are accepted, not the %d of VITRINE_MAX_CONNECTIONS: this process may open %d files, "
            "and keeps half of the free ones for other purposes; raise the limit (ulimit -n)",
            limit,
            wanted,
            soft,
        )
    return limit
