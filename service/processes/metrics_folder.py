"""A folder for each server, in which its workers share their metrics.

BentoML has one for all servers of a home, and empties it at every start: two servers would delete and add up each
other's numbers. Ours are held by a lock of every process that uses them, which ends with the process however it dies;
each start removes the folders that nobody holds any more.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_ROOT = "vitrine-metrics"  # under BENTOML_HOME
_held: list[int] = []  # descriptors, open as long as this process lives


def use_own_folder() -> None:
    """Have BentoML give its workers, by PROMETHEUS_MULTIPROC_DIR, a folder of this process's, which is removed when it
    ends. Raises `OSError` where nothing can be written."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    BentoMLContainer.prometheus_multiproc_dir.set(_claim(BentoMLContainer.bentoml_home.get()))


def hold(folder: str | Path) -> None:
    """Keep a folder from being removed while this process lives. Without effect where it cannot be locked."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # no such folder: the metrics are kept in memory (operations/metric_files.py)
    _held.append(descriptor)
    _lock(descriptor, fcntl.LOCK_SH)


@cache
def _claim(home: str) -> str:
    try:
        root = Path(home) / _ROOT
        root.mkdir(exist_ok=True)
        with _alone(root):  # else a new folder might be removed before it is held
            _sweep(root)
            folder = tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root)
            hold(folder)
    except OSError:  # no room there; where there is none at all, this raises
        folder = tempfile.mkdtemp(prefix=f"{_ROOT}-")
        hold(folder)
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # forked processes run it, too
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(root: Path) -> None:
    for folder in root.iterdir():
        if not folder.is_dir():
            continue
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """Whether the lock was had. Some network file systems have none: nothing is removed there."""
    try:
        fcntl.flock(descriptor, kind)
    except OSError:
        return False
    return True
