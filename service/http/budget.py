"""The bytes that a worker holds for its clients: of bodies until their request ends, of answers until they are sent.

Only bytes that have come count, so a declared length holds nothing. An upload that would exceed the limit is refused;
an answer, which was admitted as a request, is never refused, but leaves less for uploads.
"""

from __future__ import annotations

import sys

ACCOUNT = "vitrine.account"  # key of a request's `Account` in its ASGI scope


class Budget:
    """limit: bytes that all accounts together may take."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.unsent = 0  # what was left to the connections to send, at their last check


class Account:
    """The bytes of one request. `close` gives back whatever it still holds."""

    __slots__ = ("_budget", "_held", "is_overdrawn")

    def __init__(self, budget: Budget) -> None:
        self._budget, self._held = budget, 0
        self.is_overdrawn = False  # a part of the body was refused: the request must be, too

    def take(self, size: int) -> bool:
        """Whether so many more bytes of a body are within the limit; they are held then."""
        if self._budget.held + self._budget.unsent + size > self._budget.limit:
            self.is_overdrawn = True
            return False
        self.hold(size)
        return True

    def hold(self, size: int) -> None:
        """Hold bytes of an answer, whatever the limit."""
        self._budget.held += size
        self._held += size

    def give_back(self, size: int) -> None:
        self._budget.held -= size
        self._held -= size

    def close(self) -> None:
        self.give_back(self._held)


UNLIMITED = Budget(sys.maxsize)  # for servers without our connections, as in tests of the application alone
