"""Cost of new labels for other clients: one client requests 16,000 texts while the others classify images.

    python loadtests/labels.py --bundle build/b32-random --rounds 3 --seconds 10

Each round has three parts: 64 new labels are requested without other clients; `--clients` clients classify a picture
with the bundle's labels; then they do this while one client requests its 16,000 texts and another one new label at a
time. Ratios are over all answers of a kind.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Annotated

import httpx
import numpy as np
import typer

from corpus import drawn_images, multipart
from server import Server, serving

TEMPLATES = ("a photo of a {}", "a drawing of a {}", "the {}", "one {}", "a blurry {}", "a small {}", "a {}", "{}")
LABELS_AT_ONCE = 2000  # under eight templates: 16,000 texts
ADJECTIVES = "red green blue old new small big wooden tall round wet dry young wild tame loud quiet dark bright cold"
NOUNS = "car dog house tree boat chair cup lamp horse bird apple door shoe clock bridge plane river stone coat spoon"
Times = list[float]  # seconds


def main(
    bundle: Annotated[Path | None, typer.Option(help="Bundle to serve; default: the embedded one.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds, quiet and busy in turn.")] = 3,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of each round.")] = 10,
    clients: Annotated[
        int, typer.Option(min=1, help="Number of clients that classify; each sends its next request after an answer.")
    ] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Number of requests with 64 new labels per round.")] = 5,
) -> None:
    """Print the time that 64 new labels take, and quantiles of other clients' answers, quiet and busy."""
    with serving(bundle) as server:
        new, used, quiet, busy, single = asyncio.run(_measure(server, rounds, seconds, clients, repeats))
    quantiles = [np.quantile(times, (0.5, 0.99)) * 1e3 for times in (quiet, busy)]
    print(
        f"64 new labels: minimum {min(new) * 1e3:.0f} ms, median {statistics.median(new) * 1e3:.0f}; processor time "
        f"of the service: minimum {min(used) * 1e3:.0f} ms"
    )
    print(f"{clients} clients, quiet: p50 {quantiles[0][0]:.0f} ms, p99 {quantiles[0][1]:.0f} ({len(quiet)} answers)")
    print(
        f"while 16,000 texts are encoded: p50 {quantiles[1][0]:.0f} ms, p99 {quantiles[1][1]:.0f} ({len(busy)} answers)"
    )
    print("busy over quiet: p50 {:.2f}, p99 {:.2f}".format(*quantiles[1] / quantiles[0]))
    print(
        f"one new label in addition: median {statistics.median(single) * 1e3:.0f} ms, maximum {max(single) * 1e3:.0f}"
    )


async def _measure(
    server: Server, rounds: int, seconds: float, clients: int, repeats: int
) -> tuple[Times, Times, Times, Times, Times]:
    """(64 new labels, their processor time; classify, quiet; classify, busy; one new label, busy)."""
    new, used, quiet, busy, single = Times(), Times(), Times(), Times(), Times()
    labels = _new_labels()
    content, headers = multipart(drawn_images(1)[0], "{}")
    classify = {"url": "/v1/classify", "content": content, "headers": headers}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        await _ask(client, seconds=2, times=Times(), requests=itertools.repeat(classify))
        for _ in range(rounds):
            for _ in range(repeats):
                texts = [f"a photo of a {label}" for label in itertools.islice(labels, 64)]
                start, before = perf_counter(), server.processor_seconds()
                await _post(client, {"url": "/v1/embed", "json": {"texts": texts}})
                new.append(perf_counter() - start)
                used.append(server.processor_seconds() - before)
            others = [(seconds, times, itertools.repeat(classify)) for times in [quiet] * clients]
            await asyncio.gather(*(_ask(client, *other) for other in others))
            async with _beside(client, labels):
                await asyncio.sleep(1)
                others = [(seconds, times, itertools.repeat(classify)) for times in [busy] * clients]
                one = ({"url": "/v1/embed", "json": {"texts": [label]}} for label in labels)
                await asyncio.gather(*(_ask(client, *other) for other in others), _ask(client, seconds, single, one))
            await asyncio.sleep(1)
    return new, used, quiet, busy, single


@asynccontextmanager
async def _beside(client: httpx.AsyncClient, labels: Iterator[str]) -> AsyncIterator[None]:
    """Somebody who asks for 16,000 new texts, and again once they are answered, or refused at the deadline."""

    async def ask() -> None:
        while True:
            request = {"labels": list(itertools.islice(labels, LABELS_AT_ONCE)), "templates": TEMPLATES}
            content, headers = multipart(drawn_images(1)[0], json.dumps(request))
            await client.post("/v1/classify", content=content, headers=headers)

    task = asyncio.create_task(ask())
    try:
        yield
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _ask(client: httpx.AsyncClient, seconds: float, times: Times, requests: Iterable[dict]) -> None:
    """Ask, one request after the other, for so many seconds; adds how long each answer took."""
    end = perf_counter() + seconds
    for request in requests:
        start = perf_counter()
        if start >= end:
            return
        await _post(client, request)
        times.append(perf_counter() - start)


async def _post(client: httpx.AsyncClient, request: dict) -> None:
    answer = await client.post(**request)
    answer.raise_for_status()


def _new_labels() -> Iterator[str]:
    """Endless, hardly any twice: two or three words."""
    chance = random.Random(0)  # noqa: S311
    adjectives, nouns = ADJECTIVES.split(), NOUNS.split()
    words = [*itertools.product(adjectives, nouns), *itertools.product(adjectives, adjectives, nouns)]
    chance.shuffle(words)
    for number in itertools.count():
        for label in words:
            yield " ".join(label) if not number else f"{' '.join(label)} {number}"


if __name__ == "__main__":
    typer.run(main)
