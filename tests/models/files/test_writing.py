"""Files and folders are whole or absent, whatever the file system refuses."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from faults import NO_FLUSH, NO_FOLDER_RENAME, NO_LINKS, NO_ROOM, everything, fail, largest_file
from vitrine.models.files.errors import FileError
from vitrine.models.files.writing import create, move_folder, prepare_file, prepare_folder, write_text, written

LAST = "manifest.json"


@pytest.fixture
def folder(tmp_path):
    """A finished folder, not in its place yet."""
    source = tmp_path / ".partial"
    (source / "deep").mkdir(parents=True)
    for name in ("a", LAST, "z", "deep/b"):
        (source / name).write_text(name)
    return source


def is_folder(path, *_):
    return Path(path).is_dir()


def write_half(file, error):
    """Write some of a file; then this error is raised, if any."""
    with written(file) as partial:
        partial.write_text("half")
        if error is not None:
            raise error


# One file


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_written_at_the_end_of_the_block(tmp_path, before, shared):
    file = tmp_path / "file"
    if before:
        file.write_text(before)
    with written(file, shared=shared) as partial:
        partial.write_text("new")
        assert (file.read_text() if before else file.exists()) == (before or False)
    assert everything(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("code", NO_ROOM)
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_file_stays_as_it_was_if_anything_fails(tmp_path, monkeypatch, call, code):
    file = tmp_path / "file"
    file.write_text("old")
    if call != "write":
        fail(monkeypatch, os, call, code)
    error = OSError(code, os.strerror(code)) if call == "write" else None
    with pytest.raises(FileError, match=rf"^{file} cannot be written: {os.strerror(code)}"):
        write_half(file, error)
    assert everything(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_by_an_end_of_any_kind(tmp_path, error):
    with pytest.raises(error):
        write_half(tmp_path / "file", error)
    assert everything(tmp_path) == {}


def test_the_kernel_stops_in_the_middle_of_a_file(tmp_path):
    with pytest.raises(FileError, match="File too large; the file system, or `ulimit -f`"), largest_file(1000):
        write_text(tmp_path / "file", "x" * 5000)
    assert everything(tmp_path) == {}


@pytest.mark.parametrize("code", NO_FLUSH)
def test_a_flush_that_there_is_not_is_gone_without(tmp_path, monkeypatch, folder, code):
    fail(monkeypatch, os, "fsync", code)
    write_text(tmp_path / "file", "text")
    assert create(tmp_path / "other", "text")
    move_folder(folder, tmp_path / "target", LAST)
    assert len(everything(tmp_path)) == 6


def test_a_folder_that_nobody_may_open_is_not_flushed(tmp_path, monkeypatch):
    fail(monkeypatch, os, "open", errno.EACCES, lambda path, *_: Path(path) == tmp_path)
    write_text(tmp_path / "file", "text")


def test_what_is_no_file_is_written_itself(tmp_path):
    """/dev/full would be replaced by a file, by root; a pipe would be read by nobody."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        write_text(pipe, "through")
        assert read.result() == "through"
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    for file in (full, Path("/dev/full")):
        with pytest.raises(FileError, match=f"^{file} cannot be written: No space left"):
            write_text(file, "text")
    assert Path("/dev/full").is_char_device()
    assert everything(tmp_path) == {}
    code = "from pathlib import Path; from vitrine.models.files.writing import write_text as w\n"
    code += "print('a', flush=True); w(Path('/dev/stdout'), 'b'); print('c')"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], check=True, stdout=out)
        assert os.fstat(out.fileno()).st_ino == (tmp_path / "out").stat().st_ino
    assert set("bc") < set((tmp_path / "out").read_text())


def test_links_stay_and_what_was_private_stays_private(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600


def test_the_longest_name_has_a_temporary_too(tmp_path):
    write_text(tmp_path / ("ä" * 127), "text")
    for function in (prepare_file, lambda file: write_text(file, "text")):
        with pytest.raises(FileError, match="File name too long; give a shorter name"):
            function(tmp_path / ("ä" * 128))


@pytest.mark.parametrize("name", ["nowhere/file", "file/file", ".", os.fsdecode(b"\xff")])
def test_names_that_cannot_be_written(tmp_path, name):
    (tmp_path / "file").write_text("a file, no folder")
    for function in (prepare_file, lambda file: write_text(file, "text")):
        with pytest.raises(FileError):
            function(tmp_path / name)
    assert everything(tmp_path) == {"file": b"a file, no folder"}


# One file, several processes


@pytest.mark.parametrize("code", [None, *NO_LINKS])
def test_a_file_is_created_once(tmp_path, monkeypatch, code):
    if code is not None:
        fail(monkeypatch, os, "link", code)
    assert create(tmp_path / "file", "first")
    assert everything(tmp_path) == {"file": b"first"}


def test_the_first_of_two_creates_it(tmp_path, monkeypatch):
    file, flush = tmp_path / "file", os.fsync

    def other(descriptor):
        if not file.exists():
            file.write_text("other")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", other)
    assert not create(file, "mine")
    assert everything(tmp_path) == {"file": b"other"}


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_nothing_is_created_if_that_fails(tmp_path, monkeypatch, call):
    fail(monkeypatch, os, call, errno.ENOSPC)
    with pytest.raises(FileError, match="No space left"):
        create(tmp_path / "file", "text")
    assert everything(tmp_path) == {}


# Folders


@pytest.mark.parametrize("code", [None, *NO_FOLDER_RENAME])
def test_a_folder_comes_into_its_place(tmp_path, monkeypatch, folder, code):
    if code is not None:
        fail(monkeypatch, os, "rename", code, is_folder)
    before = everything(folder)
    move_folder(folder, tmp_path / "target", LAST)
    assert everything(tmp_path / "target") == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_file_by_file_the_one_that_counts_is_the_last(tmp_path, monkeypatch, folder):
    fail(monkeypatch, os, "rename", errno.EXDEV, is_folder)
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(Path(new).name), replace(old, new)))
    move_folder(folder, tmp_path / "target", LAST)
    assert moved == ["a", "b", "z", LAST]


@pytest.mark.parametrize("name", ["a", "b", LAST])
def test_nothing_is_left_of_a_folder_if_a_file_cannot_be_moved(tmp_path, monkeypatch, folder, name):
    fail(monkeypatch, os, "rename", errno.EXDEV, is_folder)
    fail(monkeypatch, os, "replace", errno.ENOSPC, lambda old, new: Path(new).name == name)
    with pytest.raises(OSError, match="No space left"):
        move_folder(folder, tmp_path / "target", LAST)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("code", [None, errno.EXDEV])
def test_a_folder_that_is_there_is_not_mixed_with(tmp_path, monkeypatch, folder, code):
    if code is not None:
        fail(monkeypatch, os, "rename", code, is_folder)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("mine")
    with pytest.raises(OSError, match=r"not empty|exists"):
        move_folder(folder, tmp_path / "target", LAST)
    assert everything(tmp_path / "target") == {"mine": b"mine"}


def test_a_full_disk_becomes_known_before_the_name_is_given(tmp_path, monkeypatch, folder):
    fail(monkeypatch, os, "fsync", errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        move_folder(folder, tmp_path / "target", LAST)
    assert not (tmp_path / "target").exists()


def test_a_folder_is_tried_before_the_work(tmp_path, monkeypatch):
    prepare_folder(tmp_path / "new" / "deep")
    assert everything(tmp_path) == {}
    fail(monkeypatch, os, "open", errno.EROFS, lambda path, *_: str(path).startswith(str(tmp_path)))
    with pytest.raises(FileError, match="Read-only file system; write to another place"):
        prepare_folder(tmp_path)
