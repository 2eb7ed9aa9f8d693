"""Faults of file systems for tests: a limit that the kernel keeps, and calls of the operating system that fail.

In other processes they are injected by strace (`strace.failing`).
"""

import errno
import os
import resource
from contextlib import contextmanager


@contextmanager
def largest_file(size):
    """Within this block no file of this process grows beyond so many bytes: writing fails in the middle, EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail(monkeypatch, module, name, code, when=lambda *arguments: True):
    """Let `module.name` fail with the error `code` (a number) for the arguments for which `when` is true."""
    real = getattr(module, name)

    def call(*arguments, **options):
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, call)


def everything(folder):
    """{path: bytes} of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


NO_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM)
NO_FOLDER_RENAME = (errno.EXDEV, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EPERM, errno.EMFILE)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
