"""Files and folders that are complete or absent, even after a kill or a power cut."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitrine.models.files.names import check_name
from vitrine.models.files.problems import naming

# What a file system answers that cannot flush (some flush no folders, and some let nobody open one for that).
_NO_FLUSH = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
}
# ... that cannot rename folders: layered ones (EXDEV), network ones, and object stores, some of which count the files
# in it against a limit of none (EMFILE).
_NO_FOLDER_RENAME = {
    errno.EXDEV,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.EPERM,
    errno.EMFILE,
}
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.EINVAL}
_NAME_BYTES = 200  # of a temporary file's name that are those of its file: file systems allow 255


@contextmanager
def written(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `file`; what the block writes there becomes `file` when it ends, all at once.

    If anything fails, `file` is as before and the temporary is removed. What is no regular file (/dev/stdout, a pipe)
    is written itself. shared: other processes may be writing the same file.

    Raises `FileError`, for `file`, for whatever the block cannot write.
    """
    check_name(file)
    if _is_stream(file):
        with naming(file):
            yield file
        return
    target = _target(file)
    partial = temporary(target, shared=shared)
    try:
        with naming(file):
            yield partial
            if target.exists():  # what was private stays private
                with suppress(OSError):
                    shutil.copymode(target, partial)
            replace(partial, target)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8, all at once. Raises `FileError`."""
    with written(file) as partial:
        partial.write_text(text, encoding="utf-8")


def create(file: Path, text: str) -> bool:
    """Write a text file that is not there yet. Returns False, and leaves it alone, if it is there by now.

    Of several processes that create it at once only one gets True, where the file system has hard links.
    """
    check_name(file)
    partial = temporary(file, shared=True)
    with naming(file):
        try:
            partial.write_text(text, encoding="utf-8")
            flush(partial)
            try:
                os.link(partial, file)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                replace(partial, file)
            flush(file.parent)
            return True
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def temporary(file: Path, *, shared: bool = False) -> Path:
    """A hidden name beside `file`, the same each time so that a killed process leaves at most one; or one that no other
    process on any machine takes."""
    name = os.fsencode(file.name)[:_NAME_BYTES].decode("utf-8", "ignore")
    return file.with_name(f".{name}.{secrets.token_hex(8) if shared else 'partial'}")


def replace(partial: Path, file: Path) -> None:
    """Give a finished file its name. Raises `OSError`."""
    flush(partial)
    os.replace(partial, file)
    flush(file.parent)


def move_folder(source: Path, target: Path, last: str) -> None:
    """Give a finished folder its name, all at once where the file system renames folders.

    Elsewhere file by file, the file `last` at the end: without it a reader takes `target` for unfinished. If that fails
    nothing of `target` stays. Raises `OSError`, also if `target` exists.
    """
    for path in source.rglob("*"):
        flush(path)  # before the name: a full disk may become known only now
    flush(source)
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in _NO_FOLDER_RENAME:
            raise
        _move_files(source, target, last)
    flush(target.parent)


def _move_files(source: Path, target: Path, last: str) -> None:
    target.mkdir()
    try:
        files = [path.relative_to(source) for path in source.rglob("*") if not path.is_dir()]
        for name in sorted(files, key=lambda name: (name == Path(last), name)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if name == Path(last):
                flush(target)
            os.replace(source / name, target / name)
        flush(target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    shutil.rmtree(source, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file or folder to the disk, where the file system can. Raises `OSError` if it has no room for it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def prepare_folder(folder: Path) -> None:
    """Make a folder, if it is not there, and see whether it can be written: before the work rather than after it.

    Raises `FileError`.
    """
    check_name(folder)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=".", dir=folder) as file:
            file.write(b"x")


def prepare_file(file: Path) -> None:
    """See whether a file can be written, before the work. Raises `FileError`."""
    with naming(file):
        check_name(file)
        if os.path.isdir(file):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        if not _is_stream(file):
            with suppress(FileNotFoundError):
                os.lstat(file)  # the name itself may be refused
            with tempfile.TemporaryFile(prefix=".", dir=_target(file).parent) as probe:
                probe.write(b"x")


def _target(file: Path) -> Path:
    """Where a file is in truth: a link stays one when the file is written anew."""
    return file.resolve() if os.path.islink(file) else file


def _is_stream(file: Path) -> bool:
    """Whether it is something else than a file or a folder. (`Path` raises for names that cannot be.)"""
    is_other = os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file)
    return is_other or str(file).startswith(("/dev/", "/proc/"))
