"""One thread for the engine, fed from a queue (bounded by `Attributor`'s admission) in batches of what is waiting.

Images that arrive while an inference runs form the next batch, so batches grow with the load and no image waits for a
full batch (unless `wait_ms` is set, for GPUs whose inference is shorter than the interval between requests). Since the
graph does not depend on labels, requests with different labels and options share a batch. The engine's thread takes
its batches from the queue itself: an event loop busy with answers would delay it between two batches.

Pieces of other work, such as groups of texts, run on the same thread between batches (`Batcher.run_between`). Images go
first, but under a load that leaves no gap a piece still gets `SHARE` of the time; among pieces, those of requests that
have cost least go first, and every `OLDEST_EVERY`th turn is that of the one that has waited longest.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Decomposition
from vitrine.service.errors import ServiceError
from vitrine.service.operations import metrics

SHARE = 1 / 9  # of the engine's time that pieces get while images wait: after each, images have 8 times as long
OLDEST_EVERY = 4


class Inference(NamedTuple):
    parts: Decomposition
    queue_ms: float
    inference_ms: float  # of the whole batch, as the request waited for all of it


@dataclass(eq=False)
class _QueuedImage:
    pixels: NDArray[np.float32]
    details: bool
    components: bool
    answer: asyncio.Future[Inference]
    since: float = field(default_factory=perf_counter)


@dataclass(eq=False)
class _Piece:
    call: Callable[[], Any]
    spent: float
    answer: asyncio.Future[Any]


class Batcher:
    """Calls `explain` ([B, 3, H, W], B flags for details, B for components -> B decompositions) in its own thread.

    Use as an async context manager; on exit it drains the queue and accepts nothing new.
    """

    def __init__(
        self,
        explain: Callable[[NDArray[np.float32], list[bool], list[bool]], list[Decomposition]],
        batch_size: int,
        wait_ms: float = 0,
    ) -> None:
        """batch_size: most images in one inference; wait_ms: how long the first image waits for a full batch."""
        self._explain, self._batch_size, self._wait_ms = explain, batch_size, wait_ms
        self._queue: deque[_QueuedImage] = deque()
        self._pieces: list[_Piece] = []  # in the order in which they came
        self._condition = threading.Condition()  # guards the queues and the fields below
        self._scheduled = False  # `_run_next` is submitted or running
        self._closing = False
        self._owed = 0.0  # seconds of inference before another piece may go ahead of an image that waits
        self._turns = 0  # pieces run so far
        self._unanswered: set[asyncio.Future[Any]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    async def __aenter__(self) -> Batcher:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify()
        while self._unanswered:
            await asyncio.wait(self._unanswered)
        await asyncio.to_thread(self._thread.shutdown)

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._queue)

    async def submit(self, pixels: NDArray[np.float32], details: bool = False, components: bool = False) -> Inference:
        """The decomposition of normalised pixels [3, H, W], with `Details` and with components if requested.

        A cancelled caller (at its deadline) leaves the queue unless its inference is already running. Raises
        `ServiceError` not_ready once this batcher is closing.
        """
        queued = _QueuedImage(pixels, details, components, self._loop.create_future())
        with self._condition:
            self._check_open()
            self._queue.append(queued)
            metrics.QUEUE.inc()
            self._schedule()
            self._condition.notify()
        try:
            return await self._answered(queued.answer)
        finally:
            with self._condition:
                if queued in self._queue:
                    self._queue.remove(queued)
                    metrics.QUEUE.dec()

    async def run_between(self, function: Callable[..., Any], *args: Any, spent: float) -> Any:
        """Run a short piece of other work on the engine's thread, between two batches.

        spent: what the same request's pieces have cost so far, in any unit that all share. A cancelled caller's piece
        is not run, unless it is running already. Raises `ServiceError` not_ready once this batcher is closing.
        """
        piece = _Piece(partial(function, *args), spent, self._loop.create_future())
        with self._condition:
            self._check_open()
            self._pieces.append(piece)
            self._schedule()
        return await self._answered(piece.answer)

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function on the engine's thread before its next batch, whatever waits."""
        return await self._loop.run_in_executor(self._thread, function, *args)

    def _check_open(self) -> None:
        if self._closing:
            raise ServiceError("not_ready", "the service is shutting down")

    async def _answered(self, answer: asyncio.Future[Any]) -> Any:
        """Wait for an answer, as does whoever closes this batcher meanwhile."""
        self._unanswered.add(answer)
        answer.add_done_callback(self._unanswered.discard)
        return await answer

    def _schedule(self) -> None:
        if (self._queue or self._pieces) and not self._scheduled:
            self._scheduled = True
            self._thread.submit(self._run_next)

    def _run_next(self) -> None:
        """Run a batch or a piece on the engine's thread; calls of `run` go before the next."""
        with self._condition:
            piece = self._next_piece()
        start = perf_counter()
        answer = partial(_set_piece, piece, *_outcome(piece.call)) if piece else self._run_batch()
        seconds = perf_counter() - start
        with self._condition:
            self._owed = seconds * (1 / SHARE - 1) if piece else self._owed - seconds
            self._scheduled = False
            self._schedule()
        self._loop.call_soon_threadsafe(answer)

    def _next_piece(self) -> _Piece | None:
        """The piece whose turn it is, taken out of the queue; None if it is that of images."""
        self._pieces = [piece for piece in self._pieces if not piece.answer.done()]  # else cancelled
        if not self._pieces or (self._queue and self._owed > 0):
            return None
        self._turns += 1
        piece = self._pieces[0] if self._turns % OLDEST_EVERY == 0 else min(self._pieces, key=lambda piece: piece.spent)
        self._pieces.remove(piece)
        return piece

    def _run_batch(self) -> partial[None]:
        """Run one batch; returns what sets the answers."""
        with self._condition:
            if self._wait_ms:
                self._wait_for_full_batch()
            batch: list[_QueuedImage] = []
            while self._queue and len(batch) < self._batch_size:
                queued = self._queue.popleft()
                metrics.QUEUE.dec()
                if not queued.answer.done():  # else cancelled, but not yet removed by the event loop
                    batch.append(queued)
        start = perf_counter()
        results: list[Decomposition] = []
        error = None
        if batch:
            metrics.BATCH.observe(len(batch))
            results, error = _outcome(partial(self._infer, batch))
        inference_ms = (perf_counter() - start) * 1e3
        return partial(_set_results, batch, results, error, start, inference_ms)

    def _wait_for_full_batch(self) -> None:
        """Wait for a full batch, but no longer than the first image may be delayed."""
        while self._queue and len(self._queue) < self._batch_size and not self._closing:
            remaining = self._wait_ms / 1e3 - (perf_counter() - self._queue[0].since)
            if remaining <= 0 or not self._condition.wait(remaining):
                return

    def _infer(self, batch: list[_QueuedImage]) -> list[Decomposition]:
        pixels = np.stack([queued.pixels for queued in batch])
        details, components = [queued.details for queued in batch], [queued.components for queued in batch]
        results = self._explain(pixels, details, components)
        if len(results) != len(batch):
            raise RuntimeError(f"the engine gave {len(results)} answers for {len(batch)} images")
        return results


def _outcome(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """(result, error) of a call: errors are for those who wait for it, and the engine's thread must go on."""
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001
        return None, error


def _set_results(
    batch: list[_QueuedImage],
    results: list[Decomposition],
    error: Exception | None,
    start: float,
    inference_ms: float,
) -> None:
    for number, queued in enumerate(batch):
        if queued.answer.done():  # cancelled meanwhile
            continue
        if error:
            queued.answer.set_exception(error)
        else:
            queued.answer.set_result(Inference(results[number], (start - queued.since) * 1e3, inference_ms))


def _set_piece(piece: _Piece, result: Any, error: Exception | None) -> None:
    if piece.answer.done():  # cancelled meanwhile
        return
    if error:
        piece.answer.set_exception(error)
    else:
        piece.answer.set_result(result)
