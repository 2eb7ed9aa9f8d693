"""Standard output of the command: closed, full, or read by somebody who has had enough (`| head`)."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

NAME = "standard output"


class _Output(io.FileIO):
    """Names standard output in the error of writing to it, as only opening a file does by itself. There is one error:
    what Python tries to write again when it ends goes nowhere."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = NAME
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise


def prepare_streams() -> None:
    """Make standard streams fit to be written to by a program, whatever the shell made of them.

    Those that were closed (`>&-`) lead nowhere. Else the next file that is opened, a checkpoint, would stand in for one
    and get what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
    old = sys.stdout
    encoding, errors = (old.encoding, old.errors) if old is not None else ("utf-8", "replace")
    raw = io.BufferedWriter(_Output(1, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(raw, encoding, errors, line_buffering=os.isatty(1))


def is_unread(error: OSError) -> bool:
    """Whether nobody reads standard output any more."""
    return error.errno == errno.EPIPE and error.filename == NAME
