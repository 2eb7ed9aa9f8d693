"""A bundle that answers in a thread of its own, so that callers need no event loop and may have one (Jupyter's)."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.errors import VitrineError
from vitrine.service.answers.attributor import Attributor
from vitrine.service.operations.settings import Settings

Result = TypeVar("Result")
_open: weakref.WeakSet[Runner] = weakref.WeakSet()
Question = Callable[[Attributor], Awaitable[Result]]


class ClosedError(VitrineError, RuntimeError):
    """A call to an `Explainer` that has been closed."""


class Runner:
    """An `Attributor` on an event loop in a thread of its own. Thread-safe.

    Opening it loads the bundle and raises what `Attributor` does. A process that is forked from this one has no such
    thread, and cannot use it.
    """

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self._lock = threading.Lock()  # of the two below
        self._calls: set[Future[Any]] = set()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop
        self._attributor: Attributor
        self._end: asyncio.Event
        started: Future[None] = Future()
        # a daemon: the end of the program does not wait for it, but closes it first (`_close_all`)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(bundle, settings, started)), name="vitrine", daemon=True
        )
        self._thread.start()
        try:
            started.result()
        except BaseException:
            was_loading = started.cancel()  # by Ctrl+C: what was begun ends when it can
            self.begin_to_close()
            if not was_loading:
                self._thread.join()
            raise

    async def _serve(self, bundle: Bundle, settings: Settings, started: Future[None]) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        attributor = Attributor(bundle, settings)
        try:
            await attributor.__aenter__()
        except Exception as error:  # noqa: BLE001 - raised where the bundle was to be loaded
            if started.set_running_or_notify_cancel():
                started.set_exception(error)
            return
        try:
            self._attributor = attributor
            if not started.set_running_or_notify_cancel():
                return
            started.set_result(None)
            _open.add(self)
            await self._end.wait()
            with self._lock:
                calls = [asyncio.wrap_future(call) for call in self._calls]
            await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await attributor.__aexit__()

    def call(self, question: Question[Result]) -> Result:
        """The answer to await question(attributor). Raises what that raises, and `ClosedError`."""

        async def ask() -> Result:
            return await question(self._attributor)

        with self._lock:
            if self._closed:
                raise ClosedError("this bundle has been closed; load it again")
            call = asyncio.run_coroutine_threadsafe(ask(), self._loop)
            self._calls.add(call)
        try:
            return call.result()
        finally:
            call.cancel()  # after Ctrl+C nobody wants it
            with self._lock:
                self._calls.discard(call)

    def begin_to_close(self) -> None:
        """Take no more questions, and end when those in hand are answered. Does not wait for that."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if hasattr(self, "_end"):
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._end.set)

    def close(self) -> None:
        """The same, and wait for it. Threads and processes have ended then."""
        self.begin_to_close()
        self._thread.join()

    @property
    def is_closed(self) -> bool:
        return self._closed


def _close_all() -> None:
    """At the end of a program that has closed nothing."""
    for runner in list(_open):
        runner.close()


# Not `atexit`, whose turn comes when no thread can be given work any more: closing needs some. It has no public name,
# and is what the standard library's own pools use.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
