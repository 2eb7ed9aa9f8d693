"""Graphs that few requests need: their sessions are opened with the first of them, and not at the start."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from vitrine.models.bundle.bundle import Bundle
from vitrine.service.engine.runtime import Runtime

Sessions = TypeVar("Sessions")


class GraphsOnFirstUse(ABC, Generic[Sessions]):
    """Graphs of a bundle, opened once, by `open` or by the first call that needs them, whichever comes first. A failed
    opening leaves them closed, so that the next tries again. Thread-safe: whoever comes meanwhile waits."""

    name: str  # of what the graphs are for, as errors say it

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        self.bundle, self.runtime = bundle, runtime
        self._lock = threading.RLock()  # `check` runs the graphs in the thread that opens them
        self._sessions: Sessions | None = None

    @property
    def is_open(self) -> bool:
        """Whether `open` has nothing to do, or nearly nothing."""
        return self._sessions is not None

    def open(self) -> Sessions:
        """The sessions. They are opened and checked if no call has needed them before: takes seconds, and memory.

        Raises `BundleError` or `EngineError` if the files are not those that were verified, or not what the manifest
        says, or cannot be used.
        """
        with self._lock:
            if self._sessions is None:
                self._sessions = self.open_sessions()
                try:
                    self.bundle.check_unchanged()  # ONNX Runtime opens the graphs, and what they refer to, by path
                    self.check()
                except BaseException:
                    self._sessions = None
                    raise
            return self._sessions

    @abstractmethod
    def open_sessions(self) -> Sessions:
        """Open the sessions. Raises `EngineError`."""

    @abstractmethod
    def check(self) -> None:
        """Raise `BundleError` or `EngineError` unless the graphs are what the manifest says, and run."""
