"""How much of the engine's speed `vitrine bulk` reaches, and whether killed runs resume without loss.

    python loadtests/random_bundle.py build/b32-random
    python loadtests/bulk.py speed --bundle build/b32-random
    python loadtests/bulk.py ray --bundle build/b32-random --small 128 --large 512
    python loadtests/bulk.py kill --images 10000 --kills 3

Speed: a bare loop of the engine on one batch, and bulk runs on generated images in five formats from files to Parquet,
alternating in one process; the ratio is the median over the rounds. Ray: one process without Ray and several with it,
each with a small and a large job: the difference between the two jobs excludes the start-up. Kill: a run in a separate
process, killed with SIGKILL when a random share of it is done, then resumed.
"""

from __future__ import annotations

import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from corpus import drawn_images
from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.inputs.duck import READ_PARQUET, connect, literal
from vitrine.models.inputs.opening import open_inputs
from vitrine.service.offline.bulk.job import make_job
from vitrine.service.offline.bulk.run import bulk
from vitrine.service.offline.bulk.tables import done_parts
from vitrine.service.offline.bulk.work import Work, Worker
from vitrine.service.operations.settings import DEMO_BUNDLE, Settings
from vitrine.service.schemas.attribute import AttributeRequest

app = typer.Typer(add_completion=False, no_args_is_help=True)
Bundle = Annotated[Path, typer.Option(help="Bundle to serve; default: the embedded one.")]
DISTINCT = 200  # drawn pictures, repeated
PER_THOUSAND_BROKEN = 1


@app.command()
def speed(
    bundle: Bundle = DEMO_BUNDLE,
    images: Annotated[int, typer.Option(help="Number of images in each round, for bulk and for the bare loop.")] = 256,
    rounds: Annotated[int, typer.Option(help="Number of rounds of both, in turns.")] = 7,
    batch_size: Annotated[int, typer.Option(help="Batch size of both.")] = 8,
    side: Annotated[int, typer.Option(help="Side of the generated images, in pixels.")] = 224,
) -> None:
    """Compare images per second of bulk runs with those of a bare engine loop."""
    rates = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        _draw(root / "images", images, side)
        work = _work(bundle, root / "images", root / "out", batch_size=batch_size, part_size=128)
        work.out.mkdir()
        worker = Worker(open_bundle(bundle), work)
        size = worker.bundle.manifest.preprocessing.size
        pixels = np.random.default_rng(0).standard_normal((batch_size, 3, *size), np.float32)
        for _ in track(range(rounds), "rounds", transient=True):
            start = time.perf_counter()
            for _ in range(images // batch_size):
                worker.engine.explain(pixels)
            between = time.perf_counter()
            done = sum(step.images for step in worker.run(range(work.job.parts)))
            end = time.perf_counter()
            rates.append((done / (end - between), images // batch_size * batch_size / (between - start)))
    bulks, loops = zip(*rates, strict=True)
    ratios = [bulk_rate / loop_rate for bulk_rate, loop_rate in rates]
    print(
        f"bulk {statistics.median(bulks):.1f} images/s, bare loop in batches of {batch_size} "
        f"{statistics.median(loops):.1f}; ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}, {rounds} rounds of {images} images)"
    )


@app.command()
def ray(
    bundle: Bundle = DEMO_BUNDLE,
    small: Annotated[int, typer.Option(help="Number of images of the small job.")] = 1_000,
    large: Annotated[int, typer.Option(help="Number of images of the large job.")] = 5_000,
    workers: Annotated[int, typer.Option(help="Number of Ray processes.")] = 2,
    rounds: Annotated[int, typer.Option(help="Number of rounds of both, in turns.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Batch size of both.")] = 8,
) -> None:
    """Compare images per second of Ray processes with those of one process without Ray, not counting the start."""
    rates = []
    for _ in track(range(rounds), "rounds", transient=True):
        one, several = (
            (large - small) / (_seconds(bundle, large, batch_size, count) - _seconds(bundle, small, batch_size, count))
            for count in (0, workers)
        )
        rates.append((one, several))
        print(f"one process {one:.1f} images/s, {workers} Ray processes {several:.1f}; ratio {several / one:.3f}")
    print(f"median ratio {statistics.median(several / one for one, several in rates):.3f}")


@app.command()
def kill(
    bundle: Bundle = DEMO_BUNDLE,
    images: Annotated[
        int, typer.Option(help="Number of sound images; one per thousand is added that is broken.")
    ] = 10_000,
    kills: Annotated[int, typer.Option(help="Number of kills with SIGKILL, each at a random moment.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
) -> None:
    """Kill a run again and again, resume it, and count."""
    chance = random.Random(seed)  # noqa: S311
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        broken = images * PER_THOUSAND_BROKEN // 1_000
        _draw(root / "images", images, 96, broken)
        command = [sys.executable, __file__, "run", str(root / "images"), str(root / "out"), "--bundle", str(bundle)]
        parts = -(-(images + broken) // 512)
        moments = sorted(chance.sample(range(1, parts - 1), kills))
        for moment in moments:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603
            while process.poll() is None and len(_done(root / "out")) < moment:
                time.sleep(0.005)
            time.sleep(chance.random())  # not right at the rename, but anywhere in the next part
            process.send_signal(signal.SIGKILL)
            print(f"killed: {process.wait() == -signal.SIGKILL}, {len(_done(root / 'out'))} of {parts} parts done")
        subprocess.run(command, check=True)  # noqa: S603
        rows = _ids(root / "out")
        problems = _ids(root / "out" / "errors")
    distinct = len(set(rows + problems))
    print(f"{len(rows):,} rows and {len(problems):,} errors, {distinct:,} distinct, of {images + broken:,} images")
    if (len(rows), len(problems), distinct) != (images, broken, images + broken):
        raise typer.Exit(1)


@app.command(hidden=True)
def run(folder: Path, out: Path, bundle: Bundle = DEMO_BUNDLE) -> None:
    """The process that is killed."""
    print(bulk(open_bundle(bundle), _work(bundle, folder, out), Console()))


def _done(out: Path) -> set[int]:
    return done_parts(out) if out.is_dir() else set()


def _ids(folder: Path) -> list[int]:
    with connect() as database:
        files = [literal(path) for path in sorted(folder.glob("part-*.parquet"))]
        query = f"SELECT id FROM {READ_PARQUET}"  # noqa: S608
        return [number for (number,) in database.execute(query, [files]).fetchall()]


def _seconds(bundle: Path, images: int, batch_size: int, workers: int) -> float:
    """Duration of a whole run on drawn images, in parts of 64. workers: Ray's; 0: without Ray."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        _draw(root / "images", images, 224)
        work = _work(bundle, root / "images", root / "out", batch_size=batch_size, part_size=64)
        start = time.perf_counter()
        bulk(open_bundle(bundle), work, Console(quiet=True), workers)
        return time.perf_counter() - start


def _work(bundle: Path, folder: Path, out: Path, batch_size: int = 8, part_size: int = 512) -> Work:
    settings, source = Settings(bundle=bundle, batch_size=batch_size), open_inputs(str(folder))
    job = make_job(open_bundle(bundle), settings, source, AttributeRequest(), path=str(folder), part_size=part_size)
    return Work(job, source, out, settings)


def _draw(folder: Path, count: int, side: int, broken: int = 0) -> None:
    """Writes files of drawn pictures, with the broken ones spread among them."""
    folder.mkdir()
    pictures = drawn_images(min(count, DISTINCT), side)
    interval = (count + broken) // broken if broken else 0
    valid = 0
    for number in range(count + broken):
        is_broken = bool(interval) and number % interval == interval - 1
        (folder / f"{number:06}.jpg").write_bytes(b"" if is_broken else pictures[valid % len(pictures)])
        valid += not is_broken


if __name__ == "__main__":
    app()
