"""The service's overhead: one client's latency, and throughput under load, against bare engine calls.

    python loadtests/random_bundle.py build/b32-random
    python loadtests/overhead.py --bundle build/b32-random --photo photo.jpg
    python loadtests/overhead.py --against ../older        # compare with the service of another checkout, in turns

Latency: requests and bare calls alternate on the same photo, medians of both. Throughput: full batches in a bare loop,
then wrk's clients (a C program: a client in Python would use the processors that it measures), in alternating rounds.
The answers under load are compared, number by number, with those of single requests.
"""

from __future__ import annotations

import asyncio
import io
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from PIL import Image
from rich.progress import track

from corpus import multipart
from server import CHECKOUT, Server, serving
from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.images.decode import ImageLimits, decode
from vitrine.models.images.frame import to_pixels
from vitrine.service.engine.engine import Engine
from vitrine.service.operations.settings import DEMO_BUNDLE, Settings

TOLERANCE = 1e-4
_SCRIPT = """
local file = io.open("{body}", "rb")
wrk.method, wrk.body = "POST", file:read("*a")
wrk.headers["Content-Type"] = "multipart/form-data; boundary=x"
"""


def main(
    bundle: Annotated[Path | None, typer.Option(help="Bundle to serve; default: the embedded one.")] = None,
    photo: Annotated[
        Path | None, typer.Option(help="Image to send; default: a generated picture of 224 x 224, as JPEG.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="Number of requests, and of bare calls, of one client.")] = 200,
    seconds: Annotated[int, typer.Option(help="Seconds of each round of load.")] = 10,
    rounds: Annotated[int, typer.Option(help="Number of rounds of load and bare loop, in turns.")] = 5,
    clients: Annotated[int, typer.Option(help="Number of clients at once, under load.")] = 32,
    path: Annotated[str, typer.Option(help="Request to send.")] = "/v1/attribute",
    against: Annotated[
        Path | None, typer.Option(help="Compare with the service of this other checkout instead.")
    ] = None,
) -> None:
    """Print both ratios and the largest difference between answers."""
    if against:
        _compare_checkouts(against.resolve(), bundle, photo.read_bytes() if photo else _drawn(), path, pairs, clients)
        return
    settings = Settings(bundle=bundle or DEMO_BUNDLE)
    opened = open_bundle(settings.bundle)
    image = photo.read_bytes() if photo else _drawn()
    limits = ImageLimits(settings.max_image_pixels, settings.max_image_side)
    pixels = to_pixels(decode(image, limits).image, opened.manifest.preprocessing, limits)
    engine = Engine(opened, settings)
    engine.warm_up()
    with serving(settings.bundle) as server:
        served, bare = _latency(server, path, image, engine, pixels[None], pairs)
        print(
            f"one client: p50 {served:.2f} ms; bare engine call {bare:.2f} ms; "
            f"ratio {served / bare:.3f}, {served - bare:+.2f} ms"
        )
        worst = asyncio.run(_compare(server, path, clients))
        print(f"answers under load against single requests: largest difference {worst:.1e}")
        if shutil.which("wrk"):
            batch = np.repeat(pixels[None], settings.batch_size, 0)
            rates = list(_throughput(server, path, image, engine, batch, rounds, seconds, clients))
            loads, loops = zip(*rates, strict=True)
            ratio = statistics.median(load / loop for load, loop in rates)
            print(
                f"{clients} clients: {statistics.median(loads):.2f} images/s; bare loop in batches of {len(batch)} "
                f"{statistics.median(loops):.2f} images/s; ratio {ratio:.3f}"
            )
        else:
            print("wrk is not installed: no throughput")
    if worst > TOLERANCE:
        raise typer.Exit(1)


def _compare_checkouts(other: Path, bundle: Path | None, image: bytes, path: str, pairs: int, clients: int) -> None:
    """One client's requests to both services in turns, then bursts in turns: medians of the pairs' ratios.

    Twice, as the service that starts first gets the worse memory: 3 % slower, whichever it is.
    """
    bundle = (bundle or DEMO_BUNDLE).resolve()
    ratios: dict[str, list[float]] = {"one client": [], f"bursts of {clients}": []}
    for order in ((CHECKOUT, other), (other, CHECKOUT)):
        with serving(bundle, order[0]) as first, serving(bundle, order[1]) as second:
            new, old = (first, second) if order[0] == CHECKOUT else (second, first)
            with httpx.Client(timeout=60) as http:
                single = _in_turns(pairs, new, old, lambda server: http.post(server.url + path, files={"image": image}))
            burst = _in_turns(pairs // 10, new, old, lambda server: asyncio.run(_burst(server, path, image, clients)))
        for name, found in zip(ratios, (single, burst), strict=True):
            ratios[name].append(found)
    for name, both in ratios.items():
        orders = ", ".join(f"{ratio:.3f}" for ratio in both)
        print(f"{name}: time / {other.name}'s {statistics.geometric_mean(both):.3f} (started first, last: {orders})")


def _in_turns(pairs: int, new: Server, old: Server, request: Callable[[Server], Any]) -> float:
    """Median of the ratios of times, new / old."""
    ratios = []
    for number in track(range(pairs + 5), "in turns", transient=True):
        seconds = {}
        for server in (new, old) if number % 2 else (old, new):
            start = time.perf_counter()
            request(server)
            seconds[server.url] = time.perf_counter() - start
        if number >= 5:
            ratios.append(seconds[new.url] / seconds[old.url])
    return statistics.median(ratios)


async def _burst(server: Server, path: str, image: bytes, requests: int) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        for answer in await asyncio.gather(*(http.post(path, files={"image": image}) for _ in range(requests))):
            answer.raise_for_status()


def _drawn() -> bytes:
    levels = np.random.default_rng(0).integers(0, 60, (224, 224, 3)) + np.linspace(0, 190, 224)[None, :, None]
    buffer = io.BytesIO()
    Image.fromarray(levels.astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def _latency(server: Server, path: str, image: bytes, engine: Engine, pixels: Any, pairs: int) -> tuple[float, float]:
    """Medians (of requests, of bare calls), in milliseconds."""
    served, bare = [], []
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for number in track(range(pairs + 5), "one client", transient=True):
            start = time.perf_counter()
            http.post(path, files={"image": image}).raise_for_status()
            between = time.perf_counter()
            engine.explain(pixels)
            end = time.perf_counter()
            if number >= 5:
                served.append((between - start) * 1e3)
                bare.append((end - between) * 1e3)
    return statistics.median(served), statistics.median(bare)


def _throughput(
    server: Server, path: str, image: bytes, engine: Engine, batch: Any, rounds: int, seconds: int, clients: int
) -> Iterator[tuple[float, float]]:
    """(images a second under load, in a bare loop), per round."""
    with tempfile.TemporaryDirectory() as scratch:
        body, script = Path(scratch) / "body", Path(scratch) / "post.lua"
        body.write_bytes(multipart(image, "{}")[0])
        script.write_text(_SCRIPT.format(body=body))
        options = ["-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "60s", "-s", str(script)]
        command = ["wrk", *options, server.url + path]
        for _ in track(range(rounds), "throughput", transient=True):
            shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
            match = re.search(r"Requests/sec:\s+([\d.]+)", shown)
            if match is None or "Non-2xx" in shown:
                raise RuntimeError(shown)
            start, images = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                engine.explain(batch)
                images += len(batch)
            yield float(match[1]), images / (time.perf_counter() - start)


async def _compare(server: Server, path: str, clients: int) -> float:
    """The largest difference between the same numbers of the answers to 64 pictures, alone and all at once."""
    random = np.random.default_rng(1)
    pictures = []
    for _ in range(64):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (48, 48, 3), np.uint8)).resize((160, 120)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:

        async def ask(picture: bytes) -> list[float]:
            answer = (await http.post(path, files={"image": picture})).raise_for_status().json()
            return _numbers(answer)

        alone = [await ask(picture) for picture in pictures]
        together = await asyncio.gather(*map(ask, pictures))
    return max(abs(a - b) for one, other in zip(alone, together, strict=True) for a, b in zip(one, other, strict=True))


def _numbers(answer: Any) -> list[float]:
    """Every number of an answer, in order, except the times."""
    if isinstance(answer, dict):
        return [number for key, value in answer.items() if key != "timings_ms" for number in _numbers(value)]
    if isinstance(answer, list):
        return [number for value in answer for number in _numbers(value)]
    return [float(answer)] if isinstance(answer, int | float) else []


if __name__ == "__main__":
    typer.run(main)
