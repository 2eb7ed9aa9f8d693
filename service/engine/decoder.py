"""A decoder process: image files in, levels out, over the socket that is its standard input. `decoders` starts it.

It imports as little as it can, so that a process that had to be ended is soon replaced. The kernel ends it when an
image takes too much processor time, even within Pillow's C code; when its parent ends, so does the socket, and then it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import sys
import warnings
from dataclasses import astuple
from typing import NamedTuple

from PIL import Image

from vitrine.models.images.decode import ImageLimits, decode
from vitrine.models.images.errors import ImageError
from vitrine.models.images.frame import Framing, to_frame

HEADER = struct.Struct("<cQ")  # kind of message, bytes that follow
IMAGE, LEVELS, REFUSAL, READY = b"I", b"L", b"R", b"O"  # after the levels follow the notes, as JSON
OUT_OF_MEMORY = 75  # exit code


class Options(NamedTuple):
    """What a decoder is told at its start."""

    framing: Framing
    limits: ImageLimits
    seconds: float  # of processor time for an image
    bytes: int  # of address space

    def to_json(self) -> str:
        return json.dumps([self.framing, astuple(self.limits), self.seconds, self.bytes])

    @classmethod
    def from_json(cls, text: str) -> Options:
        (size, mode, interpolation), limits, seconds, bytes = json.loads(text)
        return cls(Framing(tuple(size), mode, interpolation), ImageLimits(*limits), seconds, bytes)


def send(connection: socket.socket, kind: bytes, content: bytes) -> None:
    connection.sendall(HEADER.pack(kind, len(content)) + content)


def receive(connection: socket.socket) -> tuple[bytes, bytearray]:
    """(kind, content). Raises `EOFError` if the other side has ended."""
    kind, length = HEADER.unpack(_read(connection, HEADER.size))
    return kind, _read(connection, length)


def _read(connection: socket.socket, length: int) -> bytearray:
    content = bytearray(length)
    view = memoryview(content)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return content


def main(arguments: str) -> None:
    """Answer images until the parent closes the socket. arguments: `Options` as JSON."""
    options = Options.from_json(arguments)
    _silence_libraries()
    warnings.simplefilter("ignore")  # Pillow warns of odd metadata, once for each tag
    Image.init()  # imports all of Pillow's formats now, rather than at the first WebP or file of no format
    _limit_memory(options.bytes)
    with socket.socket(fileno=sys.stdin.fileno()) as connection:
        try:
            send(connection, READY, b"")
            while True:
                kind, content = receive(connection)
                assert kind == IMAGE
                signal.setitimer(signal.ITIMER_PROF, options.seconds)  # SIGPROF, which is not handled, ends the process
                answer = _answer(bytes(content), options)
                signal.setitimer(signal.ITIMER_PROF, 0)
                send(connection, *answer)
        except (EOFError, ConnectionError):
            return


def _answer(image: bytes, options: Options) -> tuple[bytes, bytes]:
    try:
        picture = decode(image, options.limits)
        levels = to_frame(picture.image, options.framing, options.limits).tobytes()
        return LEVELS, levels + (json.dumps(picture.notes).encode() if picture.notes else b"")
    except ImageError as error:
        return REFUSAL, json.dumps([error.code, error.message]).encode()
    except MemoryError:
        sys.exit(OUT_OF_MEMORY)


def _silence_libraries() -> None:
    """Only Python's own errors go to the log: libtiff writes a line for every oddity that a sender may think of."""
    sys.stderr = os.fdopen(os.dup(2), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _limit_memory(bytes: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        bytes = min(bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (bytes, most))
