"""Runs attacks on a server while other clients use it, and watches both: stalls of its event loop, memory, answers."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import httpx
import numpy as np
import psutil

from attacks import Attack, Outcomes, Target, run
from corpus import http_request, multipart
from server import Server

PAUSE = 0.1  # seconds between two requests of a valid client, and between two readings of memory
VALID_CLIENTS = 2


@dataclass
class Watched:
    """What was seen during one attack, or during quiet."""

    name: str
    seconds: float = 0.0
    attack: Outcomes = field(default_factory=Counter)
    valid: Outcomes = field(default_factory=Counter)  # statuses of the valid requests
    valid_ms: list[float] = field(default_factory=list)
    probe_ms: list[float] = field(default_factory=list)  # of GET /livez, on a connection that is kept
    stall_ms: float = 0.0  # longest stall of the loop, as the service itself measured it
    mib: float = 0.0  # most memory

    @property
    def failed(self) -> int:
        """Valid requests answered otherwise than 200 and 429."""
        return sum(count for status, count in self.valid.items() if status not in ("200", "429"))


def run_attacks(server: Server, photo: bytes, attacks: Sequence[Attack], seconds: float) -> Iterator[Watched]:
    """Quiet first, then each attack once, then again and again until `seconds` have passed."""
    host, port = server.url.removeprefix("http://").split(":")
    target = Target(host, int(port), server.process.pid, photo)
    start = time.monotonic()
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as attackers:
        yield asyncio.run(_watch(server, target, None, attackers))
        for number, attack in enumerate(itertools.cycle(attacks)):
            if number >= len(attacks) and time.monotonic() - start > seconds:
                return
            yield asyncio.run(_watch(server, target, attack, attackers))


async def _watch(server: Server, target: Target, attack: Attack | None, attackers: ProcessPoolExecutor) -> Watched:
    watched, over = Watched(attack.__name__ if attack else "(quiet)"), asyncio.Event()
    before = _stalls(server)
    watchers = [
        *(asyncio.create_task(_valid_client(target, watched, over)) for _ in range(VALID_CLIENTS)),
        asyncio.create_task(_probe(server, watched, over)),
        asyncio.create_task(_read_memory(server, watched, over)),
    ]
    start = time.monotonic()
    if attack:
        loop = asyncio.get_running_loop()
        watched.attack = await loop.run_in_executor(attackers, run, attack.__name__, target)
    await asyncio.sleep(2 if attack else 10)  # what an attack has left behind shows afterwards
    over.set()
    await asyncio.gather(*watchers)
    watched.seconds = time.monotonic() - start
    watched.stall_ms = _longest_stall(before, _stalls(server)) * 1e3
    return watched


async def _valid_client(target: Target, watched: Watched, over: asyncio.Event) -> None:
    payload = http_request("/v1/attribute", *multipart(target.photo, "{}"))
    connection = None
    while not over.is_set():
        start = time.perf_counter()
        try:
            connection = connection or await asyncio.open_connection(target.host, target.port)
            reader, writer = connection
            writer.write(payload)
            head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 120)).decode().lower()
            await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
            status = head.split()[1]
            if "connection: close" in head:
                writer.close()
                connection = None
        except (OSError, EOFError, TimeoutError) as error:
            status, connection = type(error).__name__, None
        watched.valid[status] += 1
        if status == "200":
            watched.valid_ms.append((time.perf_counter() - start) * 1e3)
        await asyncio.sleep(PAUSE)
    if connection:
        connection[1].close()


async def _probe(server: Server, watched: Watched, over: asyncio.Event) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        while not over.is_set():
            start = time.perf_counter()
            try:
                await http.get("/livez")
            except httpx.TransportError as error:
                watched.valid[f"livez {type(error).__name__}"] += 1
            watched.probe_ms.append((time.perf_counter() - start) * 1e3)
            await asyncio.sleep(0.05)


async def _read_memory(server: Server, watched: Watched, over: asyncio.Event) -> None:
    while not over.is_set():
        try:
            watched.mib = max(watched.mib, await asyncio.to_thread(server.resident_mib))
        except psutil.NoSuchProcess:
            watched.valid["a worker ended"] += 1
        await asyncio.sleep(PAUSE)


def _stalls(server: Server) -> dict[float, float]:
    """Upper bound in seconds -> stalls up to it so far, from the service's own histogram."""
    stalls: dict[float, float] = {}
    for line in httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines():
        if line.startswith("vitrine_loop_stall_seconds_bucket"):
            labels, count = line.rsplit(" ", 1)
            stalls[float(labels.partition('le="')[2].partition('"')[0])] = float(count)
    return stalls


def _longest_stall(before: dict[float, float], after: dict[float, float]) -> float:
    """The smallest bound that no stall between the two readings exceeded."""
    total = after.get(np.inf, 0) - before.get(np.inf, 0)
    return min((bound for bound in after if after[bound] - before.get(bound, 0) == total), default=0.0)
