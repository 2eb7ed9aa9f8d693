"""What a public service receives: thousands of damaged images, bursts of requests of all kinds, months of load.

    python loadtests/abuse.py images --count 10000        # mutated image files: 4xx or 200, never 5xx; memory flat
    python loadtests/abuse.py bursts                      # valid, invalid, slow and aborting clients, 64 at once
    python loadtests/abuse.py overload                    # far more clients than are admitted
    python loadtests/abuse.py recovery                    # kill -9 of the worker
    python loadtests/abuse.py soak --minutes 30           # memory under steady load
    python loadtests/abuse.py attacks                     # every attack of attacks.py, together with valid requests
    python loadtests/abuse.py attacks --minutes 30        # repeated

Each command starts its own server on the embedded bundle (or --bundle); exit code 1 means that a check failed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from rich.progress import track

import attack_run
import attacks as hostile
from corpus import ALL_FORMATS, drawn_images, http_request, image_files, multipart, mutated_files
from server import Server, serving
from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.images.decode import ImageLimits, decode
from vitrine.models.images.frame import to_pixels
from vitrine.service.answers.explain import predict
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import LabelEncoder, LabelSet
from vitrine.service.operations.settings import DEMO_BUNDLE, Settings

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
BundleOption = Annotated[Path | None, typer.Option(help="Bundle to serve; default: the embedded one.")]
Corpus = Annotated[Path | None, typer.Option(help="Folder of real image files; default: generated ones.")]

WARM_UP = 500  # requests before memory is measured


@app.command()
def images(
    count: Annotated[int, typer.Option(help="Number of mutated files.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the mutations.")] = 0,
    allowed_mib: Annotated[
        float, typer.Option(help="Allowed growth of memory after the first 500 requests, in MiB.")
    ] = 50,
    bundle: BundleOption = None,
    corpus: Corpus = None,
) -> None:
    """Send mutated image files to /v1/classify: all answers are 200 or 4xx in the envelope, memory stays flat."""
    statuses: Counter[str] = Counter()
    mutants = itertools.islice(mutated_files(image_files(corpus, ALL_FORMATS), seed), count)
    with serving(bundle) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        (worker,), start = server.workers, 0.0
        for number, data in enumerate(track(mutants, "mutated images", total=count)):
            answer = http.post("/v1/classify", files={"image": data})
            code = "" if answer.status_code == 200 else " " + answer.json()["error"]["code"]
            statuses[f"{answer.status_code}{code}"] += 1
            if number == min(WARM_UP, count - 1):
                start = server.resident_mib()
        end = server.resident_mib()
        same = [process.pid for process in server.workers] == [worker.pid]
    for status, total in statuses.most_common():
        print(f"{total:7,}  {status}")
    print(f"memory {start:.0f} -> {end:.0f} MiB; the worker {'lived' if same else 'DIED'}")
    if not same or end - start > allowed_mib or any(status[0] not in "24" for status in statuses):
        raise typer.Exit(1)


@app.command()
def bursts(
    requests: Annotated[int, typer.Option(help="Number of requests in total.")] = 1024,
    burst: Annotated[int, typer.Option(help="Number of clients at once.")] = 64,
    bundle: BundleOption = None,
) -> None:
    """Send bursts of valid, invalid, slow and aborting clients: valid requests are answered as by the engine without a
    server, invalid ones with 4xx."""
    settings = Settings(bundle=bundle or DEMO_BUNDLE)
    files = drawn_images(16)
    expected = _expected(settings, files)
    with serving(bundle) as server:
        outcomes = asyncio.run(_bursts(server, files, expected, requests, burst))
        print(f"memory {server.resident_mib():.0f} MiB")
    for outcome, total in sorted(outcomes.items()):
        print(f"{total:6,}  {outcome}")
    if any(outcome.startswith("WRONG") for outcome in outcomes):
        raise typer.Exit(1)


def _expected(settings: Settings, files: list[bytes]) -> list[dict[str, float]]:
    """Label -> logit of each file, from the engine alone, one image at a time."""
    bundle = open_bundle(settings.bundle)
    engine, limits = Engine(bundle, settings), ImageLimits(10**9, 10**5)
    encoder, text = LabelEncoder(engine, 1000), bundle.manifest.text
    labels = LabelSet(tuple(text.labels), encoder.encode(text.labels, text.templates))
    answers = []
    for file in files:
        pixels = to_pixels(decode(file, limits).image, bundle.manifest.preprocessing, limits)
        (parts,) = engine.explain(pixels[None])
        predictions = predict(parts, labels, bundle.manifest.logit_scale, len(labels.labels))
        answers.append({prediction.label: prediction.logit for prediction in predictions})
    return answers


async def _bursts(
    server: Server, files: list[bytes], expected: list[dict[str, float]], requests: int, burst: int
) -> Counter[str]:
    chance = random.Random(0)  # noqa: S311
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    host, port = server.url.removeprefix("http://").split(":")
    outcomes: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:

        async def valid(path: str, slow: bool) -> str:
            number = chance.randrange(len(files))
            body, headers = multipart(files[number], '{"top_k": 100}')

            async def drip() -> Any:
                for at in range(0, len(body), len(body) // 8 + 1):
                    await asyncio.sleep(0.05)
                    yield body[at : at + len(body) // 8 + 1]

            headers["content-length"] = str(len(body))
            answer = await http.post(path, content=drip() if slow else body, headers=headers)
            kind = f"valid{', slow' if slow else ''} {path}"
            if answer.status_code != 200:
                return f"WRONG: {kind}: {answer.status_code}"
            logits = {p["label"]: p["logit"] for p in answer.json()["predictions"]}
            difference = max(abs(logits[label] - logit) for label, logit in expected[number].items())
            return f"{kind}: 200" if difference < 1e-4 else f"WRONG: {kind}: a logit is off by {difference}"

        async def invalid() -> str:
            body, headers = chance.choice(
                [
                    multipart(b"no image", "{}"),
                    multipart(files[0][:50], "{}"),
                    multipart(files[0], "{"),
                    multipart(files[0], '{"labels": []}'),
                    multipart(files[0], '{"explain": {"targets": ["nobody"]}}'),
                    (b"{}", {"content-type": "application/json"}),
                    (b"", {"content-type": "text/plain"}),
                ]
            )
            status = (await http.post("/v1/attribute", content=body, headers=headers)).status_code
            return f"{'' if 400 <= status < 500 else 'WRONG: '}invalid: {status}"

        async def leaving() -> str:
            """Sends all or half of a request and hangs up."""
            payload = http_request("/v1/attribute", *multipart(files[0], "{}"))
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(payload[: chance.choice((len(payload), len(payload) // 2))])
            await writer.drain()
            await asyncio.sleep(chance.choice((0, 0.01, 0.1)))
            writer.close()
            return "left"

        for _ in track(range(requests // burst), f"bursts of {burst}"):
            kinds = chance.choices("vaisl", (4, 2, 3, 2, 2), k=burst)
            clients = {
                "v": lambda: valid("/v1/attribute", False),
                "a": lambda: valid("/v1/classify", False),
                "i": invalid,
                "s": lambda: valid("/v1/attribute", True),
                "l": leaving,
            }
            outcomes.update(await asyncio.gather(*(clients[kind]() for kind in kinds)))
    return outcomes


@app.command()
def overload(
    clients: Annotated[int, typer.Option(help="Number of clients at once, without pause.")] = 100,
    seconds: Annotated[float, typer.Option(help="Seconds of overload.")] = 20,
    herd: Annotated[
        bool, typer.Option(help="Start all clients at the same time instead of within one second.")
    ] = False,
    bundle: BundleOption = None,
) -> None:
    """Send far more clients than are admitted: how soon the others get 429, and what the admitted ones notice."""
    with serving(bundle, VITRINE_QUEUE_SIZE="8", VITRINE_BATCH_SIZE="8", VITRINE_MAX_BATCH="8") as server:
        with suppress(PermissionError):  # the clients represent other machines
            os.nice(-10)
        light = asyncio.run(_hammer(server, 16, seconds / 4, herd))
        heavy = asyncio.run(_hammer(server, clients, seconds, herd))
    for name, times_by_status in ((f"{16} clients", light), (f"{clients} clients", heavy)):
        for status, times in sorted(times_by_status.items()):
            p50, p95, p99 = np.percentile(times, [50, 95, 99])
            prompt = np.mean(np.array(times) <= 50)
            quantiles = f"median {p50:6.1f}, p95 {p95:6.1f}, p99 {p99:6.1f} ms"
            print(f"{name}: {status}: {len(times):6,} answers; {quantiles}; {prompt:.1%} within 50 ms")
    if set(light) | set(heavy) != {200, 429}:
        raise typer.Exit(1)


async def _hammer(server: Server, clients: int, seconds: float, herd: bool) -> dict[int, list[float]]:
    """Status -> milliseconds of every answer. Refused clients retry after Retry-After.

    Uses bare streams: a client library would need more processor time than the service does.
    """
    (file,), times = drawn_images(1), dict[int, list[float]]()
    payload = http_request("/v1/attribute", *multipart(file, "{}"))
    host, port = server.url.removeprefix("http://").split(":")
    end = time.monotonic() + seconds

    async def client() -> None:
        await asyncio.sleep(0 if herd else random.random())  # noqa: S311
        reader, writer = await asyncio.open_connection(host, int(port))
        while time.monotonic() < end:
            start = time.perf_counter()
            writer.write(payload)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            status = int(answer.split()[1])
            times.setdefault(status, []).append((time.perf_counter() - start) * 1e3)
            await reader.readexactly(int(answer.partition("content-length: ")[2].split()[0]))
            if status == 429:
                after = float(answer.partition("retry-after: ")[2].split()[0])
                await asyncio.sleep(after * (0.5 + random.random()))  # noqa: S311
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return times


@app.command()
def recovery(
    clients: Annotated[int, typer.Option(help="Number of clients at once, without pause.")] = 8,
    within: Annotated[float, typer.Option(help="Allowed seconds until there are answers again.")] = 10,
    bundle: BundleOption = None,
) -> None:
    """Kill the worker (kill -9) under load: how long until there are answers again, and how many requests were lost."""
    with serving(bundle) as server:
        gap, lost, answered = asyncio.run(_recover(server, clients))
    print(
        f"{answered:,} requests answered; {lost} of {clients} clients lost a request; answers again after {gap:.1f} s"
    )
    if gap > within or lost > clients:
        raise typer.Exit(1)


async def _recover(server: Server, clients: int) -> tuple[float, int, int]:
    (file,), (worker,) = drawn_images(1), server.workers
    body, headers = multipart(file, "{}")
    killed, back = asyncio.Event(), asyncio.Event()
    killed_at, back_at, lost, answered = 0.0, 0.0, 0, 0

    async def client() -> None:
        nonlocal lost, answered, back_at
        while not back.is_set():
            try:
                async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
                    start = time.monotonic()
                    answer = await http.post("/v1/attribute", content=body, headers=headers)
            except httpx.TransportError:
                lost += 1
                continue
            answer.raise_for_status()
            answered += 1
            if killed.is_set() and start > killed_at and not back.is_set():
                back_at = time.monotonic()
                back.set()

    async def kill() -> None:
        nonlocal killed_at
        await asyncio.sleep(3)
        worker.kill()
        killed_at = time.monotonic()
        killed.set()

    await asyncio.gather(kill(), *(client() for _ in range(clients)))
    return back_at - killed_at, lost, answered


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(help="Minutes of load.")] = 30,
    clients: Annotated[int, typer.Option(help="Number of clients at once.")] = 4,
    allowed_share: Annotated[
        float, typer.Option(help="Allowed growth of memory after the first tenth of the time, as a share.")
    ] = 0.05,
    bundle: BundleOption = None,
) -> None:
    """Send a steady load of every kind of request, each with new labels: memory stays flat after the warm-up."""
    with serving(bundle) as server:
        count, readings = asyncio.run(_soak(server, drawn_images(16), minutes * 60, clients))
    for seconds, mib in readings:
        print(f"{seconds / 60:6.1f} min  {mib:7.1f} MiB")
    settled = [mib for seconds, mib in readings if seconds >= minutes * 6]
    growth = max(settled) / settled[0] - 1
    print(f"{count:,} requests; largest growth after {minutes / 10:g} min {growth:+.1%}")
    if growth > allowed_share:
        raise typer.Exit(1)


async def _soak(
    server: Server, files: list[bytes], seconds: float, clients: int
) -> tuple[int, list[tuple[float, float]]]:
    start, count, numbers = time.monotonic(), 0, itertools.count()
    readings: list[tuple[float, float]] = []
    requests: tuple[tuple[str, dict[str, Any]], ...] = (
        ("/v1/attribute", {}),
        ("/v1/attribute", {"explain": {"heatmap": True, "lens": True}}),
        ("/v1/classify", {"labels": ["cat", "dog", "a thing of its own"]}),
        ("/v1/embed", {"texts": ["a text of its own"]}),
    )
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:

        async def client() -> None:
            nonlocal count
            while time.monotonic() - start < seconds:
                number = next(numbers)
                path, request = requests[number % len(requests)]
                text = json.dumps(request).replace("of its own", f"of its own {number % 5000}")
                body, headers = multipart(files[number % len(files)], text)
                (await http.post(path, content=body, headers=headers)).raise_for_status()
                count += 1

        async def read() -> None:
            while time.monotonic() - start < seconds:
                readings.append((time.monotonic() - start, server.resident_mib()))
                await asyncio.sleep(max(1.0, seconds / 60))

        await asyncio.gather(read(), *(client() for _ in range(clients)))
    readings.append((seconds, server.resident_mib()))
    return count, readings


@app.command()
def attacks(
    names: Annotated[list[str] | None, typer.Argument(help="Names of attacks in attacks.py; default: all.")] = None,
    minutes: Annotated[float, typer.Option(help="Repeat them for this long; 0: each once.")] = 0,
    allowed_stall_ms: Annotated[
        float, typer.Option(help="Longest allowed stall of the event loop, in milliseconds.")
    ] = 100,
    allowed_mib: Annotated[float, typer.Option(help="Largest allowed memory of workers and decoders, in MiB.")] = 2048,
    allowed_share: Annotated[
        float, typer.Option(help="Allowed growth of memory at rest after the first round, as a share.")
    ] = 0.05,
    bundle: BundleOption = None,
) -> None:
    """Run every attack of attacks.py together with valid requests, which are answered only with 200 or 429; the event
    loop never stalls for long, and memory stays bounded."""
    chosen = [attack for attack in hostile.ATTACKS if not names or attack.__name__ in names]
    if names and len(chosen) < len(set(names)):
        raise typer.BadParameter(f"the attacks are {', '.join(attack.__name__ for attack in hostile.ATTACKS)}")
    (photo,), watched, at_rest = drawn_images(1, 400), [], []
    with serving(bundle) as server:
        print(f"{'attack':<18} {'s':>5} {'stall ms':>8} {'livez ms':>8} {'MiB':>6} {'p99 ms':>7}  valid; attack")
        for seen in attack_run.run_attacks(server, photo, chosen, minutes * 60):
            watched.append(seen)
            p99 = np.percentile(seen.valid_ms, 99) if seen.valid_ms else float("nan")
            numbers = f"{seen.seconds:5.0f} {seen.stall_ms:8.0f} {max(seen.probe_ms):8.0f} {seen.mib:6.0f} {p99:7.0f}"
            print(f"{seen.name:<18} {numbers}  {_counts(seen.valid)}; {_counts(seen.attack)}", flush=True)
            if (len(watched) - 1) % len(chosen) == 0:  # before the first attack, and after every round
                at_rest.append(server.resident_mib())
    growth = at_rest[-1] / at_rest[min(1, len(at_rest) - 1)] - 1
    print(f"memory at rest, after each round: {', '.join(f'{mib:.0f}' for mib in at_rest)} MiB ({growth:+.1%})")
    failed = sum(seen.failed for seen in watched)
    stall, mib = max(seen.stall_ms for seen in watched), max(seen.mib for seen in watched)
    print(f"longest stall {stall:.0f} ms, most memory {mib:.0f} MiB, {failed} valid requests failed")
    if failed or stall > allowed_stall_ms or mib > allowed_mib or growth > allowed_share:
        raise typer.Exit(1)


def _counts(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} x {outcome}" for outcome, count in outcomes.most_common()) or "-"


if __name__ == "__main__":
    app()
