"""The steps of gpu.py, each of which runs in a separate process.

    python loadtests/gpu_steps.py parity-demo rows.jsonl
    python loadtests/gpu_steps.py engine rows.jsonl --cpu

    doctor        what `vitrine doctor` prints with these settings
    parity-demo   the embedded bundle's graphs on the GPU against float32 on the CPU: logits, ledgers, source accounts
    bundle        a bundle of B/32's shape with random weights, for the other steps; it is kept next to the rows
    parity-b32    parity of that bundle, fp16 too
    engine        milliseconds per batch: plain CLIP, attribution, source accounts
    service       requests per second that the service keeps up with
    training-*    one training step of a CLT, sparse and dense
    tensorrt      parity, and milliseconds per batch, if TensorRT is installed

Rows are appended as they are measured, so rows that a step has written before it is stopped are kept. If a package or
TensorRT is not installed, a step ends with the exit code `gpu.SKIPPED` and the reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import vitrine  # noqa: F401  # first: it stops the libraries' telemetry

# isort: split
import typer

from gpu import ROOT, SKIPPED

Row = dict[str, Any]
BATCHES = (1, 8, 32)
WORKERS = (1, 4)
FIRST_RATE, RATE_SECONDS = 50, 8.0  # requests a second; of which locust's first three do not count


@dataclass(frozen=True)
class Place:
    """Where a step runs: `folder` keeps what steps share; `cpu`: on the processors, with small shapes."""

    folder: Path
    cpu: bool

    @property
    def provider(self) -> Any:
        return "cpu" if self.cpu else "cuda"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def shape(self) -> str:
        return "quick" if self.cpu else "b32"


class Unavailable(RuntimeError):
    """What a step needs is not there; the message says what."""


def doctor(place: Place) -> Iterator[Row]:
    settings = {"VITRINE_PROVIDER": place.provider, "VITRINE_PRECISION": "auto", "COLUMNS": "120"}
    command = [sys.executable, "-m", "vitrine", "doctor", "--bundle", "models/demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)  # noqa: S603
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)
    yield {"output": done.stdout}


def parity_demo(place: Place) -> Iterator[Row]:
    from gpu_engine import parity

    yield from parity(ROOT / "models/demo", place.provider)


def parity_b32(place: Place) -> Iterator[Row]:
    from gpu_engine import parity

    yield from parity(place.bundle, place.provider)


def bundle(place: Place) -> Iterator[Row]:
    from engine import Shape, plain_graphs
    from random_bundle import write_bundle

    features, k = (256, 8) if place.cpu else (6144, 32)
    plain_graphs(place.folder, Shape(place.shape), place.provider)
    if not place.bundle.exists():  # a bundle is there as a whole or not at all
        write_bundle(place.bundle, Shape(place.shape), features, k, sources=True, variants=("fp16",))
    yield {"shape": place.shape, "features": features, "k": k}


def engine(place: Place) -> Iterator[Row]:
    from engine import Shape
    from gpu_engine import timings

    batches, pairs = ((1, 2), 2) if place.cpu else (BATCHES, 20)
    yield from timings(place.bundle, place.folder, Shape(place.shape), place.provider, batches, pairs)


def service(place: Place) -> Iterator[Row]:
    from gpu_service import ladder

    settings = {"VITRINE_PROVIDER": place.provider, "VITRINE_PRECISION": "auto", "VITRINE_BATCH_SIZE": "32"}
    for workers in (1,) if place.cpu else WORKERS:
        first, most = (10, 20) if place.cpu else (FIRST_RATE, 6400)
        yield from ladder(place.bundle, settings | {"VITRINE_WORKERS": str(workers)}, first, most, RATE_SECONDS)


def training(shape: str) -> Callable[[Place], Iterator[Row]]:
    def step(place: Place) -> Iterator[Row]:
        from training_step import SHAPES, Configuration, measure
        from vitrine.training.recipes.costs import Matmul

        layers, width, features, tokens = (2, 32, 64, 10) if place.cpu else SHAPES[shape]  # type: ignore[index]
        matmuls: tuple[Matmul, ...] = ("fp32",) if place.cpu else ("tf32", "bf16")
        for matmul in matmuls:
            # the recipes' 32 images a step
            case = Configuration(layers, width, features, 32, 32 * tokens, 5, place.provider, matmul, "relu_topk")
            yield {"shape": shape, **measure(case)}

    return step


def tensorrt(place: Place) -> Iterator[Row]:
    import onnxruntime

    from gpu_engine import parity
    from vitrine.service.engine.runtime import PROVIDERS, EngineError

    if PROVIDERS["tensorrt"] not in onnxruntime.get_available_providers():
        raise Unavailable("the installed onnxruntime has no TensorRT: install onnxruntime-gpu")
    try:
        yield from parity(ROOT / "models/demo", "tensorrt", place.folder / "tensorrt")
    except EngineError as error:
        raise Unavailable(f"{error}; its libraries come with `pip install 'tensorrt-cu13<11'`") from error


STEPS: dict[str, Callable[[Place], Iterator[Row]]] = {
    "doctor": doctor,
    "parity-demo": parity_demo,
    "bundle": bundle,
    "parity-b32": parity_b32,
    "engine": engine,
    "service": service,
    "training-b32": training("b32"),
    "training-b16": training("b16"),
    "tensorrt": tensorrt,
}


def main(
    name: Annotated[str, typer.Argument(help=", ".join(STEPS))],
    rows: Annotated[Path, typer.Argument(help="File to append rows to, one JSON object per line.")],
    cpu: Annotated[bool, typer.Option("--cpu", help="Run on the processors, with small shapes.")] = False,
) -> None:
    """Run one step; see the top of this file."""
    place = Place(rows.resolve().parent, cpu)
    try:
        with rows.open("a", encoding="utf-8") as file:
            for row in STEPS[name](place):
                file.write(json.dumps(row) + "\n")
                file.flush()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "vitrine":
            raise
        typer.echo(f"{error.name} is not installed in {sys.prefix}", err=True)
        raise typer.Exit(SKIPPED) from error
    except Unavailable as error:
        typer.echo(" ".join(str(error).split()), err=True)
        raise typer.Exit(SKIPPED) from error


if __name__ == "__main__":
    typer.run(main)
