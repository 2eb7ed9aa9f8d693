"""What the operating system refused, as one sentence: which file, why, and what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitrine.models.errors import VitrineError
from vitrine.models.files.errors import FileError
from vitrine.models.files.names import display

_ROOM = "free some space there and start again, or write to another place"
_PERMISSION = "check its permissions, or choose another place"
_UNABLE = "this file system cannot do that; write to another place"
REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "the file system, or `ulimit -f`, allows no larger files; raise the limit, or write to another place",
    errno.EROFS: "write to another place",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EIO: "the disk or the connection to it failed, see the system's log; start again when it is fixed",
    errno.ESTALE: "the network file system was lost; start again when it is available",
    errno.ETIMEDOUT: "the network file system does not answer; start again when it does",
    errno.EBUSY: "another program uses it; start again when it is free",
    errno.ETXTBSY: "another program uses it; start again when it is free",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EILSEQ: "this file system does not allow such names; give another",
    errno.ELOOP: "its links form a loop; give another path",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give the name of a file",
    errno.EEXIST: "give another name",
    errno.ENOTEMPTY: "give another name",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "close other programs: the system cannot open more files",
    errno.EINVAL: _UNABLE,
    errno.ENOSYS: _UNABLE,
    errno.ENOTSUP: _UNABLE,
    errno.EOPNOTSUPP: _UNABLE,
    errno.ENOLCK: _UNABLE,
    errno.EXDEV: _UNABLE,
}
# What a library that raises its own exceptions while it writes is searched for, in their messages.
_OF_WRITING = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENAMETOOLONG,
)
_NUMPY = re.compile(r"\d+ requested and \d+ written")  # which does not say why: most likely there was no room
_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors, tokenizers


def sentence(error: BaseException) -> str | None:
    """An error of the operating system as a sentence, with the file if the error names one; None for another error."""
    if not isinstance(error, OSError) or error.errno not in REMEDIES:
        return None
    named = f"{display(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{named}{error.strerror or os.strerror(error.errno)}; {REMEDIES[error.errno]}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """For a block that writes `path`, or into it: raise what goes wrong there as a `FileError` that names it.

    A system's error names the file only if opening failed, and libraries raise exceptions of their own. An error that
    names another file, which the block reads, is about that one; a hidden one beside `path` is its temporary.
    """
    try:
        yield
    except VitrineError:
        raise
    except Exception as error:
        if (code := _code(error)) is None:
            raise
        where = _named(error, path)
        what = "cannot be written" if where == path else "cannot be used"
        raise FileError(f"{display(where)} {what}: {os.strerror(code)}; {REMEDIES.get(code, _ROOM)}") from error


def _code(error: Exception) -> int | None:
    """The number of the system's error in an exception, or in the message of a library's own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if match := _RUST.search(str(error)):
        return int(match[1])
    if _NUMPY.search(str(error)):
        return errno.ENOSPC
    return next((code for code in _OF_WRITING if os.strerror(code) in str(error)), None)


def _named(error: Exception, path: Path) -> Path:
    """The file that an error is about."""
    name = error.filename if isinstance(error, OSError) else None
    if not isinstance(name, str | bytes):
        return path
    file = Path(os.fsdecode(name))
    if not file.is_relative_to(path.parent):
        return file
    first = (*file.relative_to(path.parent).parts, "")[0]
    return path if first == path.name or first.startswith(".") else file
