"""Locks of whole files, which the kernel releases however the process ends, where the file system has them."""

from __future__ import annotations

import errno
import fcntl
from typing import IO, Any

# NFS without its lock service, Lustre and others mounted without locks, FUSE, 9p.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


def lock(file: IO[Any]) -> bool:
    """Lock an open file for this process alone. Returns False if the file system has no locks.

    Raises `BlockingIOError` if another process holds it, `OSError` for any other failure.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True
