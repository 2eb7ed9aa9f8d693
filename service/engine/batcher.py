"""One thread for the engine, a queue before it (whose bound is `Attributor`'s admission), batches of whatever waits.

Images that arrive while an inference runs form the next batch, so batches grow with the load and nobody waits for
company (unless `wait_ms` says so, for GPUs whose inference is shorter than requests are apart). Since the graph does
not depend on labels, requests with different labels and options share a batch. The engine's thread takes its batches
itself: an event loop that is busy with answers would keep it waiting between two of them.
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
class _Waiting:
    pixels: NDArray[np.float32]
    details: bool
    answer: asyncio.Future[Inference]
    since: float = field(default_factory=perf_counter)


class Batcher:
    """Feeds `explain` ([B, 3, H, W], B times whether details are wanted -> B decompositions) from its own thread.

    Use as an async context manager; leaving it answers what still waits and takes nothing new.
    """

    def __init__(
        self,
        explain: Callable[[NDArray[np.float32], list[bool]], list[Decomposition]],
        batch_size: int,
        wait_ms: float = 0,
    ) -> None:
        """batch_size: images in one inference, at most; wait_ms: how long the first waits for a full batch."""
        self._explain, self._batch_size, self._wait_ms = explain, batch_size, wait_ms
        self._queue: deque[_Waiting] = deque()
        self._arrival = threading.Condition()  # guards the queue and what follows
        self._scheduled = False  # `_work` is to come, or at it
        self._closing = False
        self._unanswered: set[asyncio.Future[Inference]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    async def __aenter__(self) -> Batcher:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._arrival:
            self._closing = True
            self._arrival.notify()
        while self._unanswered:
            await asyncio.wait(self._unanswered)
        await asyncio.to_thread(self._thread.shutdown)

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._queue)

    async def submit(self, pixels: NDArray[np.float32], details: bool = False) -> Inference:
        """Normalised pixels [3, H, W] to their decomposition, with `Details` if wanted.

        A caller that is cancelled (by its deadline) leaves the queue unless its inference already runs. Raises
        `ServiceError` not_ready once this batcher is being left.
        """
        waiting = _Waiting(pixels, details, self._loop.create_future())
        with self._arrival:
            if self._closing:
                raise ServiceError("not_ready", "the service is shutting down")
            self._queue.append(waiting)
            metrics.QUEUE.inc()
            self._schedule()
            self._arrival.notify()
        self._unanswered.add(waiting.answer)
        waiting.answer.add_done_callback(self._unanswered.discard)
        try:
            return await waiting.answer
        finally:
            with self._arrival:
                if waiting in self._queue:
                    self._queue.remove(waiting)
                    metrics.QUEUE.dec()

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Something else on the engine's thread (label encoding), in turn with the batches."""
        return await self._loop.run_in_executor(self._thread, function, *args)

    def _schedule(self) -> None:
        if self._queue and not self._scheduled:
            self._scheduled = True
            self._thread.submit(self._work)

    def _work(self) -> None:
        """One batch, on the engine's thread; what else waits for that thread comes before the next."""
        with self._arrival:
            if self._wait_ms:
                self._wait_for_company()
            batch: list[_Waiting] = []
            while self._queue and len(batch) < self._batch_size:
                waiting = self._queue.popleft()
                metrics.QUEUE.dec()
                if not waiting.answer.done():  # cancelled, and the event loop has not come to take it out yet
                    batch.append(waiting)
        start = perf_counter()
        found: list[Decomposition] | Exception = []
        if batch:
            metrics.BATCH.observe(len(batch))
            try:
                found = self._infer(batch)
            except Exception as error:  # noqa: BLE001  (handed to those who wait for it: this thread must go on)
                found = error
        inference_ms = (perf_counter() - start) * 1e3
        with self._arrival:
            self._scheduled = False
            self._schedule()
        self._loop.call_soon_threadsafe(_answer, batch, found, start, inference_ms)

    def _wait_for_company(self) -> None:
        """Until there is a full batch, but no longer than the first image may be kept."""
        while self._queue and len(self._queue) < self._batch_size and not self._closing:
            left = self._wait_ms / 1e3 - (perf_counter() - self._queue[0].since)
            if left <= 0 or not self._arrival.wait(left):
                return

    def _infer(self, batch: list[_Waiting]) -> list[Decomposition]:
        pixels = np.stack([waiting.pixels for waiting in batch])
        found = self._explain(pixels, [waiting.details for waiting in batch])
        if len(found) != len(batch):
            raise RuntimeError(f"the engine gave {len(found)} answers for {len(batch)} images")
        return found


def _answer(batch: list[_Waiting], found: list[Decomposition] | Exception, start: float, inference_ms: float) -> None:
    for number, waiting in enumerate(batch):
        if waiting.answer.done():  # cancelled meanwhile
            continue
        if isinstance(found, Exception):
            waiting.answer.set_exception(found)
        else:
            waiting.answer.set_result(Inference(found[number], (start - waiting.since) * 1e3, inference_ms))
