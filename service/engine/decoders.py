"""Decoder processes: images are decoded where an image that takes too long, or too much memory, can be stopped.

A thread cannot be ended from outside, and a few images that keep Pillow busy for minutes would stop all others. So
each image goes to a process of its own, which lives on for the next one; a process that had to be ended is replaced in
the background. Threads wait for them, so whoever gives up on an answer leaves no process with half a question.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrine.models.bundle.manifest import Preprocessing
from vitrine.models.images.decode import ImageLimits, Note
from vitrine.models.images.errors import ImageError, too_costly
from vitrine.models.images.frame import framing, normalise
from vitrine.service.engine.decoder import IMAGE, OUT_OF_MEMORY, REFUSAL, Options, receive, send
from vitrine.service.engine.runtime import EngineError
from vitrine.service.errors import ServiceError
from vitrine.service.operations import metrics
from vitrine.service.operations.logs import logger
from vitrine.service.processes.import_path import PACKAGE_PARENT

START_SECONDS = 30.0  # it takes a fifth of a second on an idle processor
BASE_BYTES, BYTES_PER_PIXEL = 256 * 2**20, 24  # of address space; measured: 100 MiB and up to 17.5 a pixel (WebP)
# The parent's import path is handed over: neither the working directory nor PYTHONPATH can bring another `vitrine`.
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from vitrine.service.engine.decoder import main; main(sys.argv[1])"
_KEPT = str(64 * 2**20)
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's threads, none of which is used here; each would reserve memory
    # glibc would return an image's memory after each one: its pages, set to zero anew, take a fifth of decoding's time
    "MALLOC_MMAP_THRESHOLD_": _KEPT,
    "MALLOC_TRIM_THRESHOLD_": _KEPT,
}


class Decoded(NamedTuple):
    """An image as the graph takes it, and what to know about it."""

    pixels: NDArray[np.float32]  # [3, H, W], normalised
    notes: tuple[Note, ...]


class Decoders:
    """At most `count` decoder processes for one bundle's preprocessing, started when they are needed.

    Use as a context manager; leaving it ends the processes, whatever they do. `decode` may be called by many threads.
    """

    def __init__(self, count: int, preprocessing: Preprocessing, limits: ImageLimits, seconds: float) -> None:
        self._count, self._preprocessing, self._seconds = count, preprocessing, seconds
        self._options = Options(framing(preprocessing), limits, seconds, BASE_BYTES + BYTES_PER_PIXEL * limits.pixels)
        self._places = threading.BoundedSemaphore(count)
        self._idle: deque[_Process] = deque()  # the last used last
        self._processes: set[_Process] = set()
        self._lock = threading.Lock()  # of the set, and of the two below
        self._closed = self._retrying = False
        self._can_start = True

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed, processes = True, list(self._processes)
        for process in processes:
            process.kill()  # a thread that waits for it notices, and closes it
        while self._idle:
            self._idle.pop().close()

    def start(self) -> None:
        """Start all processes. Raises `EngineError`."""
        with _as_engine_error():
            self._idle.extend(self._start() for _ in range(self._count))

    def wait(self) -> None:
        """Wait until one process is ready. Raises `EngineError`."""
        with _as_engine_error():
            self._give_back(self._take())

    def decode(self, image: bytes) -> Decoded:
        """The pixels of an image file.

        Raises `ServiceError` with the code of the `ImageError` that `decode` and `to_pixels` of models/images raise;
        image_too_costly if it takes more time or memory than it may; invalid_image if it makes the process crash;
        not_ready if none can be started.
        """
        with self._places:
            process = self._take()
            try:
                kind, answer = process.ask(image, 2 * self._seconds)
            except (OSError, EOFError) as error:
                raise self._lose(process, isinstance(error, TimeoutError)) from error
            self._give_back(process)
        if kind == REFUSAL:
            raise ServiceError(*json.loads(answer))
        height, width = self._preprocessing.size
        levels = np.frombuffer(answer, np.uint8, count=3 * height * width).reshape(height, width, 3)
        notes = answer[levels.size :]
        return Decoded(
            normalise(levels, self._preprocessing), tuple(Note(*note) for note in json.loads(notes)) if notes else ()
        )

    def can_decode(self) -> bool:
        """Whether processes can be started, as far as is known. If not, this tries again in the background."""
        with self._lock:
            if not self._can_start and not self._retrying and not self._closed:
                self._retrying = True
                threading.Thread(target=self._retry, name="start decoder", daemon=True).start()
        return self._can_start

    def _retry(self) -> None:
        with suppress(ServiceError):
            self._give_back(self._take())
        self._retrying = False

    def _take(self) -> _Process:
        """A process that is ready, and idle no more. Raises `ServiceError` not_ready."""
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                process = self._start()
            if process.is_alive():
                break
            self._lose(process)
        try:
            process.wait_until_ready()
        except (OSError, EOFError) as error:
            self._drop(process)
            raise self._unavailable(f"it ended with status {process.close()}") from error
        self._can_start = True
        return process

    def _give_back(self, process: _Process) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(process)
                return
        process.close()

    def _start(self) -> _Process:
        with self._lock:
            if self._closed:
                raise _stopped()
            try:
                process = _Process(self._options)
            except OSError as error:
                raise self._unavailable(str(error)) from error
            self._processes.add(process)
        return process

    def _unavailable(self, reason: str) -> ServiceError:
        self._can_start = False
        logger.error("a decoder process cannot be started: %s", reason)
        return ServiceError("not_ready", "no process to decode images can be started; the service's log has the reason")

    def _drop(self, process: _Process) -> None:
        process.kill()
        with self._lock:
            self._processes.discard(process)

    def _lose(self, process: _Process, was_late: bool = False) -> ServiceError:
        """Replace a process that has ended or did not answer in time; the error for its image."""
        self._drop(process)
        status = process.close()
        if self._closed:
            return _stopped()
        reason = "timeout" if was_late or status == -signal.SIGPROF else "crash"
        if status == OUT_OF_MEMORY or (status == -signal.SIGKILL and not was_late):  # the kernel's, for want of memory
            reason = "memory"
        metrics.DECODER_RESTARTS.labels(reason).inc()
        logger.warning("a decoder process has ended (%s, status %s); a new one replaces it", reason, status)
        with suppress(ServiceError):  # the next image will tell
            self._idle.appendleft(self._start())  # ready by the time that it is needed
        if reason == "timeout":
            return _refused(too_costly(f"the image takes longer than {self._seconds:g} s to decode"))
        if reason == "memory":
            return _refused(too_costly("the image takes too much memory to decode"))
        return ServiceError("invalid_image", "the image makes its decoder crash; save it again with another program")


@contextmanager
def _as_engine_error() -> Iterator[None]:
    try:
        yield
    except ServiceError as error:
        raise EngineError(error.message) from error


def _refused(error: ImageError) -> ServiceError:
    return ServiceError(error.code, error.message)


def _stopped() -> ServiceError:
    return ServiceError("not_ready", "the decoder processes have been stopped; send the image again")


@contextmanager
def _blocked(*numbers: signal.Signals) -> Iterator[None]:
    """Processes started meanwhile never receive these signals. BentoML sends them to its workers' children, and a
    terminal to all, whose answers are still wanted."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process:
    """One decoder process and the socket to it. `OSError` and `EOFError` mean that it has ended, or will not answer."""

    def __init__(self, options: Options) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs, _blocked(signal.SIGTERM, signal.SIGINT):
            try:
                self._process = subprocess.Popen(  # noqa: S603
                    [sys.executable, "-I", "-S", "-c", _PROGRAM, options.to_json(), *sys.path, str(PACKAGE_PARENT)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, **_ENVIRONMENT},
                )
            except OSError:
                self._connection.close()
                raise
        self._ready = False

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        if not self._ready:
            self._connection.settimeout(START_SECONDS)
            receive(self._connection)
            self._ready = True

    def ask(self, image: bytes, seconds: float) -> tuple[bytes, bytearray]:
        """(kind, content) of the answer to an image."""
        self._connection.settimeout(seconds)
        send(self._connection, IMAGE, image)
        return receive(self._connection)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> int:
        """The exit status of a process that has ended, or is about to."""
        status = self._process.wait()
        self._connection.close()
        return status
