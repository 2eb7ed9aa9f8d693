"""One thread for the engine, fed from a queue (bounded by `Attributor`'s admission) in batches of what is waiting.

Images that arrive while an inference runs form the next batch, so batches grow with the load and no image waits for a
full batch (unless `wait_ms` is set, for GPUs whose inference is shorter than the interval between requests). Since the
graph does not depend on labels, requests with different labels and options share a batch. The engine's thread takes
its batches from the queue itself: an event loop busy with answers would delay it between two batches.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Decomposition
from vitrine.service.errors import ServiceError
from vitrine.service.operations import metrics


class Inference(NamedTuple):
    parts: Decomposition
    queue_ms: float
    inference_ms: float  # of the whole batch, as the request waited for all of it


@dataclass(eq=False)
class _QueuedImage:
    pixels: NDArray[np.float32]
    details: bool
    answer: asyncio.Future[Inference]
    since: float = field(default_factory=perf_counter)


class Batcher:
    """Calls `explain` ([B, 3, H, W], B flags for details -> B decompositions) in its own thread.

    Use as an async context manager; on exit it drains the queue and accepts nothing new.
    """

    def __init__(
        self,
        explain: Callable[[NDArray[np.float32], list[bool]], list[Decomposition]],
        batch_size: int,
        wait_ms: float = 0,
    ) -> None:
        """batch_size: most images in one inference; wait_ms: how long the first image waits for a full batch."""
        self._explain, self._batch_size, self._wait_ms = explain, batch_size, wait_ms
        self._queue: deque[_QueuedImage] = deque()
        self._condition = threading.Condition()  # guards the queue and the fields below
        self._scheduled = False  # `_run_batch` is submitted or running
        self._closing = False
        self._unanswered: set[asyncio.Future[Inference]] = set()
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

    async def submit(self, pixels: NDArray[np.float32], details: bool = False) -> Inference:
        """The decomposition of normalised pixels [3, H, W], with `Details` if requested.

        A cancelled caller (at its deadline) leaves the queue unless its inference is already running. Raises
        `ServiceError` not_ready once this batcher is closing.
        """
        queued = _QueuedImage(pixels, details, self._loop.create_future())
        with self._condition:
            if self._closing:
                raise ServiceError("not_ready", "the service is shutting down")
            self._queue.append(queued)
            metrics.QUEUE.inc()
            self._schedule()
            self._condition.notify()
        self._unanswered.add(queued.answer)
        queued.answer.add_done_callback(self._unanswered.discard)
        try:
            return await queued.answer
        finally:
            with self._condition:
                if queued in self._queue:
                    self._queue.remove(queued)
                    metrics.QUEUE.dec()

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run another function on the engine's thread (label encoding), in turn with the batches."""
        return await self._loop.run_in_executor(self._thread, function, *args)

    def _schedule(self) -> None:
        if self._queue and not self._scheduled:
            self._scheduled = True
            self._thread.submit(self._run_batch)

    def _run_batch(self) -> None:
        """Run one batch on the engine's thread; other calls waiting for that thread run before the next batch."""
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
        results: list[Decomposition] | Exception = []
        if batch:
            metrics.BATCH.observe(len(batch))
            try:
                results = self._infer(batch)
            except Exception as error:  # noqa: BLE001  (passed to the waiting callers: this thread must go on)
                results = error
        inference_ms = (perf_counter() - start) * 1e3
        with self._condition:
            self._scheduled = False
            self._schedule()
        self._loop.call_soon_threadsafe(_set_results, batch, results, start, inference_ms)

    def _wait_for_full_batch(self) -> None:
        """Wait for a full batch, but no longer than the first image may be delayed."""
        while self._queue and len(self._queue) < self._batch_size and not self._closing:
            remaining = self._wait_ms / 1e3 - (perf_counter() - self._queue[0].since)
            if remaining <= 0 or not self._condition.wait(remaining):
                return

    def _infer(self, batch: list[_QueuedImage]) -> list[Decomposition]:
        pixels = np.stack([queued.pixels for queued in batch])
        results = self._explain(pixels, [queued.details for queued in batch])
        if len(results) != len(batch):
            raise RuntimeError(f"the engine gave {len(results)} answers for {len(batch)} images")
        return results


def _set_results(
    batch: list[_QueuedImage], results: list[Decomposition] | Exception, start: float, inference_ms: float
) -> None:
    for number, queued in enumerate(batch):
        if queued.answer.done():  # cancelled meanwhile
            continue
        if isinstance(results, Exception):
            queued.answer.set_exception(results)
        else:
            queued.answer.set_result(Inference(results[number], (start - queued.since) * 1e3, inference_ms))
