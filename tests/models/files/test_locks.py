"""Locks, where there are any."""

import errno
import fcntl

import pytest

from faults import NO_LOCKS, fail
from vitrine.models.files.locks import lock


def test_one_holds_it(tmp_path):
    with (tmp_path / "lock").open("w") as one, (tmp_path / "lock").open("w") as two:
        assert lock(one)
        with pytest.raises(BlockingIOError):
            lock(two)
    with (tmp_path / "lock").open("w") as three:
        assert lock(three)


@pytest.mark.parametrize("code", NO_LOCKS)
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    fail(monkeypatch, fcntl, "flock", code)
    with (tmp_path / "lock").open("w") as file:
        assert not lock(file)


def test_another_failure_is_one(tmp_path, monkeypatch):
    fail(monkeypatch, fcntl, "flock", errno.EIO)
    with (tmp_path / "lock").open("w") as file, pytest.raises(OSError, match="Input/output"):
        lock(file)
