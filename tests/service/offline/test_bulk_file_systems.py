"""Bulk runs on file systems that are full, read-only, or without locks."""

import errno
import fcntl
import io
import os
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from faults import everything, fail, largest_file
from strace import failing
from vitrine.models.files.errors import FileError
from vitrine.models.inputs.opening import open_inputs
from vitrine.service.offline.bulk import tables
from vitrine.service.offline.bulk.errors import BulkError
from vitrine.service.offline.bulk.job import lock_output, make_job
from vitrine.service.offline.bulk.run import Summary, bulk
from vitrine.service.offline.bulk.work import Work
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import AttributeRequest

SETTINGS = Settings(batch_size=4)
DONE = [".lock", "_errors/part-000001.parquet", "_job.json", "part-000000.parquet", "part-000001.parquet"]


@pytest.fixture
def photos(picture, tmp_path):
    """Four images, the last one broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture(seed=number) if number < 3 else b"none")
    return folder


@pytest.fixture
def work(bundle, photos, tmp_path):
    """Two parts of two images, into `out`."""
    source = open_inputs(str(photos))
    job = make_job(bundle, SETTINGS, source, AttributeRequest(), path=str(photos), part_size=2)
    return Work(job, source, tmp_path / "out", SETTINGS)


@pytest.fixture
def run(bundle, work):
    """run() -> (`Summary`, what was printed)"""

    def run():
        printed = io.StringIO()
        summary = bulk(bundle, work, Console(file=printed, width=1000))
        assert summary == Summary(3, 1)
        assert sorted(everything(work.out)) == DONE
        return printed.getvalue()

    return run


@pytest.mark.parametrize(("size", "part"), [(100, "_job.json"), (2_000, "part-000000.parquet")])
def test_a_full_disk(run, work, size, part):
    """While _job.json is written, while the first part is."""
    with largest_file(size), pytest.raises(FileError, match=rf"^{work.out}/{part} cannot be written: File too large"):
        run()
    assert everything(work.out).keys() == {".lock", "_job.json"} - {part}
    run()


@pytest.mark.parametrize(
    ("call", "number"), [*(("fsync", n) for n in (1, 3, 5, 7)), *(("replace", n) for n in (1, 2, 3))]
)
def test_every_step_of_writing_may_fail(run, work, monkeypatch, call, number):
    """_job.json is flushed and linked, each of three tables is flushed and renamed."""
    calls = []
    with monkeypatch.context() as patch:
        fail(patch, os, call, errno.EDQUOT, lambda *_: calls.append(call) or len(calls) == number)
        with pytest.raises(FileError, match="cannot be written: Disk quota exceeded; free some space"):
            run()
    assert everything(work.out).keys() < set(DONE)
    run()


def test_what_ray_is_told(work, bundle, monkeypatch):
    """An exception would become a traceback there."""
    pytest.importorskip("ray")
    from vitrine.service.offline.bulk.ray_engine import _Process

    work.out.mkdir()
    process, parts = _Process(bundle.path, work), {"item": np.array([0])}
    with largest_file(2_000):
        assert "part-000000.parquet cannot be written: File too large" in process(parts)["problem"][0]
    other = replace(work, job=work.job.model_copy(update={"bundle": "sha256:other"}))
    assert "is not the bundle that the run was started with" in _Process(bundle.path, other)(parts)["problem"][0]
    assert _Process(bundle.path, work)(parts) == {"images": [2], "problems": [0], "problem": [""]}


def test_without_locks_it_says_so_and_leaves_another_runs_files_alone(run, work, monkeypatch):
    fail(monkeypatch, fcntl, "flock", errno.ENOLCK)
    work.out.mkdir()
    other = work.out / ".part-000001.parquet.another"
    other.write_bytes(b"half")
    DONE.insert(1, other.name)
    try:
        assert "is on a file system without locks" in run()
    finally:
        DONE.remove(other.name)
    monkeypatch.undo()
    assert "locks" not in run()  # and removes what a killed run left


def test_two_runs_at_once_without_locks(run, work, bundle, monkeypatch):
    """One in the middle of the other: the same parts, each whole."""
    fail(monkeypatch, fcntl, "flock", errno.ENOSYS)
    write, inner = tables.write_part, []

    def meanwhile(*arguments):
        if not inner:
            inner.append(True)
            run()
        write(*arguments)

    monkeypatch.setattr("vitrine.service.offline.bulk.work.write_part", meanwhile)
    run()
    assert inner


def test_two_jobs_cannot_begin_one_folder_without_locks(work, monkeypatch):
    """Neither sees the other's _job.json when it looks; the first to write it has the folder."""
    fail(monkeypatch, fcntl, "flock", errno.EOPNOTSUPP)
    other, fsync = work.job.model_copy(update={"top_k": 3}), os.fsync

    def meanwhile(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        with lock_output(work.out, other):
            pass
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    with pytest.raises(BulkError, match="top_k was 3 and is now 5"), lock_output(work.out, work.job):
        pass


@pytest.mark.parametrize(
    ("faults", "code", "said"),
    [
        ({"flock": "ENOLCK", "fsync": "EINVAL", "link": "EPERM"}, 0, "without locks"),
        ({"fsync": "ENOSPC:when=3+"}, 1, "_errors/part-000001.parquet cannot be written: No space left on device"),
        ({"rename": "EXDEV"}, 1, "part-000000.parquet cannot be written: Invalid cross-device link; this file system"),
        ({"mkdir": "EROFS"}, 1, "out cannot be written: Read-only file system; write to another place"),
    ],
)
def test_the_command_under_strace(run_python, light_python, photos, bundle_path, tmp_path, faults, code, said):
    """Real errors, in a real process."""
    out, options = tmp_path / "out", ["--bundle", bundle_path, "--part-size", 2]
    command = [*failing(faults), light_python, "-m", "vitrine", "bulk", photos, "--out", out, *options]
    ended = run_python(*command[1:], python=command[0])
    assert ended.returncode == code, ended.stderr
    assert said in " ".join((ended.stdout + ended.stderr).split())
    assert "Traceback" not in ended.stderr
    assert everything(out).keys() < set(DONE) if code else sorted(everything(out)) == DONE
