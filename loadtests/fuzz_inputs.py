"""Thousands of damaged inputs for the readers of `bulk` and of training: Parquet files, tars, lists, JSON, recipes.

    python loadtests/fuzz_inputs.py                               # 12,000 inputs, some minutes on one processor
    python loadtests/fuzz_inputs.py --count 500 --kind parquet --seed 7
    python loadtests/fuzz_inputs.py --show parquet/123 --seed 7   # make one again, and print what its readers report

Each input is listed, read and decoded as `vitrine bulk` does, and tars also as training does. It must be read, or be
refused with one sentence, in bounded time and memory, without another exception and without a crash. Inputs that fail
are kept in a folder, and the exit code is then 1.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple
from unittest.mock import patch

import typer
from rich.progress import track

from corpus import drawn_images
from fuzz_corpus import LISTED, mutate, seeds
from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.bundle.label_sets import read_label_set
from vitrine.models.errors import VitrineError
from vitrine.models.images.decode import ImageLimits, decode
from vitrine.models.inputs.opening import open_inputs
from vitrine.models.inputs.source import Item
from vitrine.service.offline.bulk.job import Job, lock_output, make_job
from vitrine.service.operations.settings import DEMO_BUNDLE, Settings
from vitrine.service.schemas.attribute import AttributeRequest

if TYPE_CHECKING:
    from vitrine.training.recipes.image_sources import Source

# Their shares.
KINDS = {"parquet": 6, "huggingface": 2, "tar": 6, "list": 1}
KINDS |= {"labels": 1, "job": 1, "manifest": 1, "checkpoint": 1, "recipe": 1}
ADDRESS_SPACE = 8 * 2**30  # bytes: for the machine's sake; what is allowed is measured
LONGEST_MESSAGE = 4_000  # characters; a sentence may list every wrong key of a recipe
PARTS = (0, 2, 3, 1_000_000)  # bounds of the parts in which the images are read


class Verdict(NamedTuple):
    """What became of one input."""

    outcome: str  # read, refused; else a failure
    detail: str
    images: int = 0
    broken: int = 0
    seconds: float = 0.0
    mib: float = 0.0


# The readers: each returns how many images were decoded, and how many were refused.


def _bulk(file: Path) -> tuple[int, int]:
    """As bulk reads it; where that ends with a sentence, past what is broken."""
    try:
        return _in_parts(file, skip_broken=False)
    except VitrineError as error:
        _check_sentence(error)
        return _in_parts(file, skip_broken=True)


def _in_parts(file: Path, *, skip_broken: bool) -> tuple[int, int]:
    """Images in parts, one after the other, and then once more from the middle."""
    found = [0, 0]
    source = open_inputs(str(file), skip_broken=skip_broken)
    source.skipped.lines()
    source.digest()
    reader = source.reader()
    try:
        for start, stop in itertools.pairwise(PARTS):
            for item in reader.items(start, min(stop, len(source))):
                found[not _decoded(item)] += 1
        for item in reader.items(1, min(2, len(source))):
            _decoded(item)
    finally:
        reader.close()
    return found[0], found[1]


def _decoded(item: Item) -> bool:
    item.name.encode()
    try:
        decode(item.read(), ImageLimits())
    except (VitrineError, OSError) as error:  # rows of the table of errors
        _check_sentence(error)
        return False
    return True


def _tar(file: Path) -> tuple[int, int]:
    """As bulk, and as training."""
    from vitrine.training.recipes.image_sources import WebDatasetSource

    try:
        _train(WebDatasetSource(kind="webdataset", shards=file.name), file.parent)
    except VitrineError as error:
        _check_sentence(error)
    return _bulk(file)


def _train(source: Source, data_root: Path) -> tuple[int, int]:
    """As training reads it: any number of images may be broken, but not all."""
    import torch

    from vitrine.training.data.sources import open_images

    images = open_images(source, data_root, lambda _: torch.zeros(1), max_broken=1)
    for number in range(len(images)):
        images.name(number).encode()
        images[number]
    return len(images) - len(images.broken), len(images.broken)


def _data_set(file: Path) -> tuple[int, int]:
    from vitrine.training.recipes.image_sources import HuggingFaceSource

    try:
        return _train(HuggingFaceSource(kind="huggingface", id=file.parent.name, split="train"), file.parent.parent)
    finally:
        shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)  # it knows files by name, time and size


def _labels(file: Path) -> tuple[int, int]:
    read_label_set(file)
    return 0, 0


def _job(file: Path) -> tuple[int, int]:
    with lock_output(file.parent, _demo_job()):
        return 0, 0


def _manifest(file: Path) -> tuple[int, int]:
    open_bundle(file.parent)
    return 0, 0


def _checkpoint(file: Path) -> tuple[int, int]:
    from vitrine.training.checkpoint import read_meta

    read_meta(file.parent)
    return 0, 0


def _recipe(file: Path) -> tuple[int, int]:
    from vitrine.training.recipes.reading import load_recipe

    load_recipe(file)
    return 0, 0


READERS: dict[str, tuple[str, Callable[[Path], tuple[int, int]]]] = {  # kind -> (file's name, reader)
    "parquet": ("x.parquet", _bulk),
    "huggingface": ("x.parquet", _data_set),
    "tar": ("x.tar", _tar),
    "list": ("list.txt", _bulk),
    "labels": ("x.json", _labels),
    "job": ("_job.json", _job),
    "manifest": ("manifest.json", _manifest),
    "checkpoint": ("checkpoint.json", _checkpoint),
    "recipe": ("x.toml", _recipe),
}


def judge(kind: str, data: bytes, folder: Path) -> Verdict:
    """Read one input in this process, from a file in `folder`."""
    name, reader = READERS[kind]
    file = folder / kind / name
    file.write_bytes(data)
    before, start = _memory("VmRSS"), time.perf_counter()
    with suppress(OSError), open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # begin the peak anew
    images = broken = 0
    try:
        images, broken = reader(file)
        outcome, detail = "read", ""
    except VitrineError as error:
        outcome, detail = "refused", str(error)
        if problem := _sentence_problem(error):
            outcome = problem
    except Exception:  # noqa: BLE001  (what is looked for)
        outcome, detail = "exception", traceback.format_exc()
    return Verdict(outcome, detail, images, broken, time.perf_counter() - start, _memory("VmHWM") - before)


def _check_sentence(error: Exception) -> None:
    if problem := _sentence_problem(error):
        raise AssertionError(problem) from error


def _sentence_problem(error: Exception) -> str:
    """What is wrong with an error's message, if anything."""
    message = str(error)
    try:
        message.encode()
    except UnicodeEncodeError:
        return "the message is not a text"
    return "no message" if not message else "endless message" if len(message) > LONGEST_MESSAGE else ""


def _memory(name: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    return 0.0


def prepare(folder: Path) -> dict[str, list[bytes]]:
    """What stands beside the inputs, in a folder for each kind; the seeds."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    os.environ |= {"DATASETS_VERBOSITY": "critical", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    files = seeds()
    for kind in KINDS:
        (folder / kind).mkdir()
    for kind in ("list", "parquet"):
        for name, image in zip(LISTED[:-1], drawn_images(3, side=24), strict=True):
            path = folder / kind / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(image)
    for path in DEMO_BUNDLE.iterdir():
        (folder / "manifest" / path.name).symlink_to(path)
    (folder / "manifest" / "manifest.json").unlink()
    files["manifest"] = [(DEMO_BUNDLE / "manifest.json").read_bytes()]
    files["job"] = [_demo_job().model_dump_json(indent=2).encode()]
    files["checkpoint"] = [_demo_checkpoint()]
    return files


_made: list[Job] = []


def _demo_job() -> Job:
    if not _made:
        source = open_inputs(str(DEMO_BUNDLE / "cards" / "images.parquet"), "picture")
        _made.append(make_job(open_bundle(DEMO_BUNDLE), Settings(), source, AttributeRequest(), path="inputs"))
    return _made[0]


def _demo_checkpoint() -> bytes:
    from vitrine.training.checkpoint import CheckpointMeta
    from vitrine.training.recipes.catalogue import find_recipe
    from vitrine.training.recipes.reading import load_recipe

    recipe = load_recipe(find_recipe("demo"))
    meta = CheckpointMeta(step=1, steps=2, recipe=recipe, clip_sha256="0" * 64, layers=3, width=32, broken={"a": "b"})
    return meta.model_dump_json().encode()


def made(seed: int, kind: str, number: int, files: dict[str, list[bytes]]) -> bytes:
    """The input of that number."""
    return mutate(kind, files[kind], random.Random(f"{seed}/{kind}/{number}"))  # noqa: S311


def _serve(connection: Connection, seed: int, folder: Path, files: dict[str, list[bytes]]) -> None:
    """The process in which inputs are read: (kind, number) in, `Verdict` out."""
    import torch  # before memory is measured

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for kind in KINDS:  # what is imported on the way
        judge(kind, files[kind][0], folder)
    connection.send("ready")
    while (question := connection.recv()) is not None:
        connection.send(judge(question[0], made(seed, question[0], question[1], files), folder))


class Reading:
    """A process that reads inputs; another one in its place if it ends or must be ended."""

    def __init__(self, seed: int, folder: Path, files: dict[str, list[bytes]], seconds: float) -> None:
        self._arguments, self.seconds = (seed, folder, files), seconds
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        if self._connection.recv() != "ready":
            raise RuntimeError("the readers cannot be started")

    def judge(self, kind: str, number: int) -> Verdict:
        self._connection.send((kind, number))
        try:
            if self._connection.poll(self.seconds):
                return self._connection.recv()
            verdict = Verdict("hang", f"no answer within {self.seconds:g} s", seconds=self.seconds)
        except EOFError:
            self._process.join()
            verdict = Verdict("crash", f"the process ended with {self._process.exitcode}")
        self.close()
        self._start()
        return verdict

    def end(self) -> None:
        """Let the process end by itself."""
        self._connection.send(None)
        self._process.join(10)
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


@dataclass
class Result:
    """What became of all inputs."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by kind
    images: int = 0
    broken: int = 0
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[float, str] = (0.0, "")

    def lines(self) -> Iterator[str]:
        for kind, outcomes in self.outcomes.items():
            counted = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common())
            yield f"{kind:10} {sum(outcomes.values()):6,}: {counted}"
        yield f"images: {self.images:,} decoded, {self.broken:,} refused"
        yield f"slowest: {self.slowest[0]:.2f} s ({self.slowest[1]})"
        yield f"most memory: {self.largest[0]:.0f} MiB above the memory at rest ({self.largest[1]})"


def fuzz(
    count: int, seed: int, kinds: list[str], keep: Path, seconds: float, allowed_mib: float, progress: bool = False
) -> Result:
    """Read `count` inputs, by turns of these kinds; those that fail are written to `keep`."""
    turns = [kind for kind in kinds for _ in range(KINDS[kind])]
    random.Random(seed).shuffle(turns)  # noqa: S311
    result = Result()
    with tempfile.TemporaryDirectory() as place, patch.dict(os.environ):  # the caller's variables stay as they were
        folder = Path(place)
        files = prepare(folder)
        reading = Reading(seed, folder, files, seconds)
        try:
            for number in track(range(count), "inputs", disable=not progress):
                kind = turns[number % len(turns)]
                verdict = reading.judge(kind, number)
                name = f"{kind}/{number}"
                outcome = verdict.outcome
                if verdict.mib > allowed_mib and outcome in ("read", "refused"):
                    outcome = "memory"
                result.outcomes[kind][outcome] += 1
                result.images, result.broken = result.images + verdict.images, result.broken + verdict.broken
                result.slowest = max(result.slowest, (verdict.seconds, name))
                result.largest = max(result.largest, (verdict.mib, name))
                if outcome not in ("read", "refused"):
                    result.failures.append(f"{name}: {outcome}: {verdict.detail.strip().splitlines()[-1]}")
                    keep.mkdir(parents=True, exist_ok=True)
                    path = keep / f"{kind}-{seed}-{number}"
                    path.write_bytes(made(seed, kind, number, files))
                    path.with_name(f"{path.name}.log").write_text(verdict.detail, errors="replace")
            reading.end()
        finally:
            reading.close()
    return result


def main(
    count: Annotated[int, typer.Option(min=1, help="Inputs.")] = 12_000,
    seed: Annotated[int, typer.Option(help="Seed of the mutations.")] = 0,
    kind: Annotated[list[str] | None, typer.Option(help=f"{', '.join(KINDS)} (repeatable); default: all.")] = None,
    keep: Annotated[Path, typer.Option(help="Folder for inputs that fail.")] = Path("build/fuzz"),
    seconds: Annotated[float, typer.Option(help="Longest allowed time for one input, in seconds.")] = 30,
    allowed_mib: Annotated[
        float, typer.Option(help="Largest allowed memory for one input, above the memory at rest, in MiB.")
    ] = 1024,
    show: Annotated[
        str | None, typer.Option(help="KIND/NUMBER: make only this input, and read it in this process.")
    ] = None,
) -> None:
    if unknown := set(kind or ()) - KINDS.keys():
        raise typer.BadParameter(f"{', '.join(unknown)}: not one of {', '.join(KINDS)}", param_hint="--kind")
    if show is not None:
        chosen, _, number = show.partition("/")
        with tempfile.TemporaryDirectory() as place:
            files = prepare(Path(place))
            data = made(seed, chosen, int(number), files)
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{chosen}-{seed}-{number}").write_bytes(data)
            typer.echo(json.dumps(judge(chosen, data, Path(place))._asdict(), indent=2).replace("\\n", "\n"))
        return
    started = time.perf_counter()
    result = fuzz(count, seed, kind or list(KINDS), keep, seconds, allowed_mib, progress=sys.stderr.isatty())
    typer.echo(f"seed {seed}, {time.perf_counter() - started:.0f} s, {os.cpu_count()} processors")
    for line in result.lines():
        typer.echo(line)
    for failure in result.failures:
        typer.echo(failure)
    if result.failures:
        typer.echo(f"{len(result.failures):,} failed; they are in {keep.absolute()}")
        raise typer.Exit(1)


main.__doc__ = __doc__

if __name__ == "__main__":
    typer.run(main)
