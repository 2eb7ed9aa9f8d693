"""Latency cost of feature cards: one client queries two servers in turn, on one bundle with and without cards.

    python loadtests/cards.py --bundle models/demo

Then the latency of the cards' own routes: a card, a search, similar images.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.progress import track

from corpus import drawn_images
from server import serving
from vitrine.models.bundle.bundle import Bundle, open_bundle
from vitrine.models.bundle.sealing import seal
from vitrine.service.operations.settings import DEMO_BUNDLE

WARM_UP = 20


def main(
    bundle: Annotated[Path, typer.Option(help="A bundle with cards.")] = DEMO_BUNDLE,
    pairs: Annotated[int, typer.Option(help="Number of requests to each of the two services.")] = 500,
) -> None:
    """Print the ratio of the medians, and the medians of the cards' routes."""
    opened = open_bundle(bundle)
    if opened.manifest.cards is None:
        raise typer.BadParameter(f"{bundle} has no cards", param_hint="--bundle")
    with tempfile.TemporaryDirectory() as scratch:
        bare = _without_cards(opened, Path(scratch) / "bare")
        with serving(bundle) as with_cards, serving(bare) as without:
            clients = [httpx.Client(base_url=server.url, timeout=60) for server in (with_cards, without)]
            image = {"image": drawn_images(1)[0]}
            requests = [partial(client.post, "/v1/attribute", files=image) for client in clients]
            times = _in_turns(requests, pairs)
            with_ms, bare_ms = map(statistics.median, times)
            ratios = statistics.median(one / other for one, other in zip(*times, strict=True))
            print(
                f"/v1/attribute: {with_ms:.2f} ms with cards, {bare_ms:.2f} ms without: ratio {with_ms / bare_ms:.3f}; "
                f"median of paired ratios {ratios:.3f}"
            )
            http, layers, features = clients[0], opened.manifest.shape.layers, opened.manifest.shape.features
            routes: dict[str, Callable[[int], httpx.Response]] = {
                "a card": lambda n: http.get(f"/v1/features/{n * 7 % layers}/{n * 131 % features}"),
                "a search": lambda n: http.get("/v1/features", params={"label": "abcdefgh"[n % 8]}),
                "similar images, all layers": lambda n: http.post("/v1/similar", files=image),
            }
            for name, send in routes.items():
                durations = [_milliseconds(partial(send, number)) for number in range(100)]
                print(f"{name}: median {statistics.median(durations):.1f} ms, largest {max(durations):.1f} ms")
            for client in clients:
                client.close()


def _without_cards(bundle: Bundle, out: Path) -> Path:
    shutil.copytree(bundle.path, out, ignore=shutil.ignore_patterns("cards"))
    seal(out, bundle.manifest.model_copy(update={"cards": None}))
    return out


def _in_turns(requests: Sequence[Callable[[], httpx.Response]], pairs: int) -> list[list[float]]:
    """Milliseconds of each request, sent in turns; which comes first changes from pair to pair."""
    times: list[list[float]] = [[] for _ in requests]
    for number in track(range(pairs + WARM_UP), "pairs", transient=True):
        order = range(len(requests)) if number % 2 else reversed(range(len(requests)))
        for which in order:
            took = _milliseconds(requests[which])
            if number >= WARM_UP:
                times[which].append(took)
    return times


def _milliseconds(send: Callable[[], httpx.Response]) -> float:
    start = time.perf_counter()
    send().raise_for_status()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    typer.run(main)
