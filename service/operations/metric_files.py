"""The files in which each worker keeps its metrics, for whichever worker is asked for the sum.

prometheus_client makes a file larger without taking room for it, and maps it: where the disk is full, the first number
written there kills the process (SIGBUS). Here room is taken first, and where there is none the numbers are kept in the
worker's memory. Then they are complete only where one worker serves, or where this one is asked.
"""

from __future__ import annotations

import glob
import mmap
import os
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import Metric, multiprocess, values
from prometheus_client.mmap_dict import _INITIAL_MMAP_SIZE, MmapedDict, _pack_integer, _read_all_values
from prometheus_client.multiprocess import MultiProcessCollector

from vitrine.service.operations.logs import logger

_in_memory: dict[str, AllocatedDict] = {}  # by the names of the files that they stand for
_problem: OSError | None = None  # the first
_log_at_once = False


class AllocatedDict(MmapedDict):
    """prometheus_client's dictionary of one worker's numbers, in a file with room, else in memory."""

    _f: Any  # None: in memory

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        try:
            with open(filename, "ab") as file:
                _allocate(file.fileno(), max(file.tell(), _INITIAL_MMAP_SIZE))
            super().__init__(filename, read_mode)
        except OSError as error:
            self._f, self._fname, self._positions, self._used = None, filename, {}, 8
            self._move_to_memory(b"", _INITIAL_MMAP_SIZE, error)
            _pack_integer(self._m, 0, self._used)

    def _init_value(self, key: str) -> None:
        # A length, the key padded to 8, value and time; the base class would grow the file without taking room.
        while self._used + len(key.encode()) + 28 > self._capacity:
            self._grow()
        super()._init_value(key)

    def _grow(self) -> None:
        capacity = 2 * self._capacity
        try:
            if self._f is None:
                self._move_to_memory(self._m[:], capacity)
            else:
                _allocate(self._f.fileno(), capacity)
                self._m, self._capacity = mmap.mmap(self._f.fileno(), capacity), capacity
        except OSError as error:
            self._move_to_memory(self._m[:], capacity, error)
            self._f.close()
            self._f = None

    def _move_to_memory(self, data: bytes, capacity: int, error: OSError | None = None) -> None:
        self._m, self._capacity = mmap.mmap(-1, capacity), capacity
        self._m[: len(data)] = data
        _in_memory[self._fname] = self
        if error is not None:
            _remember(error)

    @staticmethod
    def read_all_values_from_file(filename: str) -> Iterable[tuple[str, float, float, int]]:
        """(key, value, time, position) of each number of a worker."""
        if own := _in_memory.get(filename):
            return _read_all_values(own._m[:])
        if os.path.getsize(filename) == 0:  # another worker's, that is in its memory
            return ()
        return MmapedDict.read_all_values_from_file(filename)


class AllWorkers:
    """Collector of every worker's numbers, from their files in a folder and from this process's memory."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Metric]:
        files: Any = {*glob.glob(os.path.join(self.folder, "*.db")), *_in_memory}
        return MultiProcessCollector.merge(sorted(files), accumulate=True)


def log_problems() -> None:
    """Log that there was no room, if so, now that logs are set up; later problems are logged at once."""
    global _log_at_once
    _log_at_once = True
    if _problem is not None:
        _log(_problem)


def _remember(error: OSError) -> None:
    global _problem
    if _problem is None:
        _problem = error
        if _log_at_once:
            _log(error)


def _log(error: OSError) -> None:
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    logger.warning("there is no space for metrics in %s (%s): this worker keeps them in memory", folder, error.strerror)


def _allocate(descriptor: int, size: int) -> None:
    """Take room for the first `size` bytes of a file. Raises `OSError`."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(descriptor, 0, size)


values.MmapedDict = multiprocess.MmapedDict = AllocatedDict  # type: ignore[misc]
