"""How many requests are started in one turn of the event loop.

Hundreds of requests that come in the same instant would all be started in one turn, which then takes as long as all of
them together: half a second in which nothing else is looked at.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

AT_ONCE = 16  # requests, about a millisecond each until they wait for the first time


class Pace:
    """Starts requests in the order in which they come. Use by one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._started = 0  # in this turn of the loop

    def start(self, loop: asyncio.AbstractEventLoop, request: Callable[[], None]) -> None:
        """Call `request` now, or in one of the next turns."""
        if self._started == AT_ONCE:
            self._waiting.append(request)
            return
        if not self._started:
            loop.call_soon(self._next_turn, loop)
        self._started += 1
        request()

    def _next_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._started = 0
        for _ in range(min(AT_ONCE, len(self._waiting))):
            self.start(loop, self._waiting.popleft())
