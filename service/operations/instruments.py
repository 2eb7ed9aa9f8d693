"""What a worker measures of itself while it serves: delays of its event loop, and the memory that it takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import psutil

from vitrine.service.operations import metric_files, metrics

STALL_INTERVAL = 0.02  # seconds
MEMORY_INTERVAL = 5.0


@asynccontextmanager
async def running(memory_limit: int) -> AsyncIterator[None]:
    """Measure meanwhile. memory_limit: bytes that this server may use."""
    metric_files.log_problems()
    metrics.MEMORY_LIMIT.set(memory_limit)
    tasks = [asyncio.create_task(_measure_stalls()), asyncio.create_task(_measure_memory())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _measure_stalls() -> None:
    """Whatever holds the loop, or the GIL, makes this task wake up late, as it makes every request wait."""
    loop, longest = asyncio.get_running_loop(), 0.0
    while True:
        due = loop.time() + STALL_INTERVAL
        await asyncio.sleep(STALL_INTERVAL)
        stall = max(0.0, loop.time() - due)
        metrics.STALL.observe(stall)
        if stall > longest:
            longest = stall
            metrics.STALL_MAX.set(stall)


async def _measure_memory() -> None:
    while True:
        metrics.MEMORY.set(await asyncio.to_thread(resident_memory))
        await asyncio.sleep(MEMORY_INTERVAL)


def resident_memory() -> int:
    """Bytes of this process and of its child processes. Pages that several of them share count for each."""
    process, total = psutil.Process(), 0
    for member in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += member.memory_info().rss
    return total
