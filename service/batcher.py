"""One thread for the engine, a bounded queue before it, batches of whatever waits.

Images that arrive while an inference runs form the next batch, so batches grow with the load and nobody waits for
company (unless `wait_ms` says so, for GPUs whose inference is shorter than requests are apart). Since the graph does
not depend on labels, requests with different labels and options share a batch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.ledger import Decomposition
from service import metrics
from service.errors import ServiceError, queue_full


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
        queue_size: int,
        wait_ms: float = 0,
    ) -> None:
        """batch_size: images in one inference, at most; queue_size: images that wait, at most; wait_ms: how long the
        first of them waits for a full batch."""
        self._explain, self._batch_size, self._queue_size, self._wait_ms = explain, batch_size, queue_size, wait_ms
        self._queue: deque[_Waiting] = deque()
        self._arrived, self._full = asyncio.Event(), asyncio.Event()
        self._closing = False
        self._idle = True
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    async def __aenter__(self) -> Batcher:
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        self._arrived.set()
        self._full.set()
        await self._task
        self._thread.shutdown()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._queue)

    async def submit(self, pixels: NDArray[np.float32], details: bool = False) -> Inference:
        """Normalised pixels [3, H, W] to their decomposition, with `Details` if wanted.

        Raises `ServiceError` queue_full at once when it is. A caller that is cancelled (by its deadline) leaves its
        place unless its inference already runs.
        """
        if self._closing:
            raise ServiceError("not_ready", "the service is shutting down")
        about_to_leave = self._batch_size if self._idle else 0  # the next batch, which `_serve` has yet to take
        if len(self._queue) >= self._queue_size + about_to_leave:
            raise queue_full()
        waiting = _Waiting(pixels, details, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._arrived.set()
        if len(self._queue) >= self._batch_size:
            self._full.set()
        try:
            return await waiting.answer
        finally:
            if waiting in self._queue:
                self._queue.remove(waiting)

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Something else on the engine's thread (label encoding), in turn with the batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _serve(self) -> None:
        while self._queue or not self._closing:
            await self._arrived.wait()
            if self._wait_ms and self._queue and not self._closing:
                await self._company()
            batch = [self._queue.popleft() for _ in range(min(self._batch_size, len(self._queue)))]
            if not self._queue and not self._closing:
                self._arrived.clear()
            if batch:
                self._idle = False
                await self._answer(batch)
                self._idle = True

    async def _company(self) -> None:
        """Wait for a full batch, but no longer than the first image may be kept."""
        if len(self._queue) < self._batch_size:
            self._full.clear()
        kept_ms = (perf_counter() - self._queue[0].since) * 1e3
        with suppress(TimeoutError):
            await asyncio.wait_for(self._full.wait(), max(0.0, self._wait_ms - kept_ms) / 1e3)

    async def _answer(self, batch: list[_Waiting]) -> None:
        start = perf_counter()
        metrics.BATCH.observe(len(batch))
        try:
            pixels = np.stack([waiting.pixels for waiting in batch])
            found = await self.run(self._explain, pixels, [waiting.details for waiting in batch])
            if len(found) != len(batch):
                raise RuntimeError(f"the engine gave {len(found)} answers for {len(batch)} images")
        except Exception as error:  # noqa: BLE001  (handed to those who wait for it: this loop must go on)
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        inference_ms = (perf_counter() - start) * 1e3
        for waiting, parts in zip(batch, found, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(Inference(parts, (start - waiting.since) * 1e3, inference_ms))
