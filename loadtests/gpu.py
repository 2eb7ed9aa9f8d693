"""Everything that needs a GPU, in eight minutes: steps in separate processes, and one JSON file of all results.

    loadtests/gpu.sh                               (makes the environment first, then this)
    python loadtests/gpu.py --seconds 480
    python loadtests/gpu.py --again                (the failed steps, too)
    python loadtests/gpu.py --cpu                  (the same steps on small shapes, to try the script; no figures)
    python loadtests/gpu.py --table build/gpu/gpu.json

The most valuable steps come first. A step that fails, hangs or misses a package does not affect the others; gpu.json
is written again after each step, so a stopped run continues where it stopped, without repeating steps. The states:

    done          its rows are complete
    failed        the reason is the last line of its log, NAME.log next to the JSON; it is repeated only with --again
    skipped       something that it needs is missing; the next run tries it again
    out of time   the --seconds of this run were too few; the next run continues with it

What each step does is in gpu_steps.py; RESULTS.md and deploy/CAPACITY.md contain the rows as --table prints them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import vitrine  # noqa: F401  # first: it stops the libraries' telemetry

# isort: split
import psutil
import typer

from gpu_table import markdown
from vitrine.models.files.writing import write_text
from vitrine.service.engine.processors import available_processors, memory_limit

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 3  # exit code of a step that lacks something
PACKAGES = (
    "onnxruntime-gpu", "onnxruntime", "torch", "nvidia-cuda-runtime", "nvidia-cudnn-cu13", "tensorrt", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    name: str
    share: float  # seconds that it may take
    least: float  # with fewer left of all steps' time, it is not begun
    after: tuple[str, ...] = ()  # steps that must be done


# In order of value. The shares are more than the whole budget: most steps need less than theirs.
STEPS = (
    Step("doctor", 40, 10),
    Step("parity-demo", 60, 20),
    Step("bundle", 200, 60),
    Step("parity-b32", 60, 20, ("bundle",)),
    Step("engine", 90, 30, ("bundle",)),
    Step("service", 120, 40, ("bundle",)),
    Step("training-b32", 100, 25),
    Step("training-b16", 100, 25),
    Step("tensorrt", 90, 20),
)


@dataclass
class Recorder:
    """gpu.json: the machine, and what has become of every step."""

    file: Path
    result: dict[str, Any]

    @classmethod
    def open(cls, file: Path, machine: dict[str, Any], provider: str) -> Recorder:
        """Take up what there is, if it is of this machine; raises `typer.BadParameter` if it is of another."""
        if not file.exists():
            begun = datetime.now(UTC).isoformat(timespec="seconds")
            return cls(file, {"provider": provider, "begun": begun, "code": code(), "machine": machine, "steps": {}})
        found = json.loads(file.read_text(encoding="utf-8"))
        for what, is_, was in (
            ("provider", provider, found["provider"]),
            *((key, machine.get(key), found["machine"].get(key)) for key in sorted({*machine, *found["machine"]})),
        ):
            if is_ != was:
                raise typer.BadParameter(
                    f"{file} was measured with {what} {_shown(was)}, but here it is {_shown(is_)}: give another --out"
                )
        return cls(file, found)

    def state(self, name: str) -> str:
        return str(self.result["steps"].get(name, {}).get("state", ""))

    def record(self, name: str, state: str, seconds: float, rows: list[dict[str, Any]], reason: str = "") -> None:
        step: dict[str, Any] = {"state": state, "seconds": round(seconds, 1), "rows": rows}
        self.result["steps"][name] = step | ({"reason": reason} if reason else {})
        write_text(self.file, json.dumps(self.result, indent=1))
        typer.echo(f"{name}: {state}, {seconds:.1f} s" + (f": {reason}" if reason else ""))


def run(
    steps: Sequence[Step],
    command: Callable[[Step, Path], list[str]],
    recorder: Recorder,
    seconds: float,
    again: bool = False,
    environment: dict[str, str] | None = None,
) -> None:
    """Run what is not done, in `seconds` at most.

    Args:
        command: from a step and the file to which it appends its rows, a JSON object a line, to a command line.
        again: also the steps that failed.
    """
    end = time.monotonic() + seconds
    for step in steps:
        if recorder.state(step.name) == "done" or (recorder.state(step.name) == "failed" and not again):
            continue
        if missing := [name for name in step.after if recorder.state(name) != "done"]:
            recorder.record(step.name, "skipped", 0, [], f"it requires the step {missing[0]}, which is not done")
            continue
        left = end - time.monotonic()
        if left < step.least:
            reason = f"{max(0.0, left):.0f} s were left, but it takes at least {step.least:g} s"
            recorder.record(step.name, "out of time", 0, [], reason)
            continue
        _run_step(step, command, recorder, min(step.share, left), environment)


def _run_step(
    step: Step,
    command: Callable[[Step, Path], list[str]],
    recorder: Recorder,
    limit: float,
    environment: dict[str, str] | None,
) -> None:
    folder = recorder.file.parent
    file, log = folder / f"{step.name}.jsonl", folder / f"{step.name}.log"
    file.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603
            command(step, file), stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    took, rows, said = time.monotonic() - start, _rows(file), _last_line(log)
    if code == 0:
        recorder.record(step.name, "done", took, rows)
    elif code == SKIPPED:
        recorder.record(step.name, "skipped", took, rows, said)
    elif code is not None:
        recorder.record(step.name, "failed", took, rows, said or f"it ended with code {code}, without a message")
    elif limit < step.share:
        reason = f"it was stopped after {limit:.0f} s, because the time of all steps was over"
        recorder.record(step.name, "out of time", took, rows, reason)
    else:
        recorder.record(step.name, "failed", took, rows, f"it did not end within {limit:g} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step and all that it started: a server has a process group of its own."""
    if process.poll() is not None:
        return
    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in started:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(started, timeout=3)  # the next step finds the GPU free


def _rows(file: Path) -> list[dict[str, Any]]:
    """What a step has measured, up to where it was stopped."""
    if not file.exists():
        return []
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]  # the last line may be cut short
    return [json.loads(line) for line in whole.splitlines()]


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _shown(value: object) -> str:
    return "nothing" if value in (None, "") else str(value)


def gpu() -> dict[str, str]:
    """The first GPU: name, memory, driver, the newest CUDA that the driver knows. Empty if there is none."""
    found = shutil.which("nvidia-smi")
    if found is None:
        return {}
    fields = "name,memory.total,driver_version,compute_cap"
    asked = [found, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        shown = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout  # noqa: S603
        about = subprocess.run([found], capture_output=True, text=True, check=True, timeout=60).stdout  # noqa: S603
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return {}
    name, memory, driver, capability = (part.strip() for part in shown.splitlines()[0].split(","))
    cuda = re.search(r"CUDA[^:]*Version:\s*([\d.]+)", about)
    return {
        "gpu": name,
        "gpu memory": memory,
        "driver": driver,
        "compute capability": capability,
        "cuda of the driver": cuda[1] if cuda else "unknown",
    }


def code() -> str:
    """The commit that is measured, as git describes it."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    asked = [git, "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"  # noqa: S603


def machine() -> dict[str, Any]:
    """What figures depend on. It is compared when a run is taken up again."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        **gpu(),
        "cpu": names[0] if names else "unknown",
        "processors": available_processors()[0],
        "memory": f"{memory_limit()[0] / 2**30:.0f} GiB",
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": versions,
    }


def environment() -> dict[str, str]:
    """For the steps: ONNX Runtime finds the wheels' CUDA, cuDNN and TensorRT by LD_LIBRARY_PATH, as in
    deploy/Dockerfile; errors end with one line that says it all, not with a frame of columns."""
    places = [Path(place) for place in site.getsitepackages()]
    wheels = ("nvidia/*/lib", "tensorrt_libs")
    folders = [str(folder) for place in places for wheel in wheels for folder in sorted(place.glob(wheel))]
    known = os.environ.get("LD_LIBRARY_PATH")
    paths = [str(ROOT), *([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [])]
    return {
        **os.environ,
        "TYPER_STANDARD_TRACEBACK": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "LD_LIBRARY_PATH": os.pathsep.join([*([known] if known else []), *folders]),
    }


def main(
    seconds: Annotated[float, typer.Option(min=1, help="Seconds for all steps of this run together.")] = 480,
    again: Annotated[bool, typer.Option("--again", help="Repeat the steps that failed.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only this step (repeatable).")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Run small shapes on the processors, to try the script.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: build/gpu, with --cpu build/gpu-cpu.")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Only print this gpu.json as Markdown.")] = None,
) -> None:
    """Measure all that needs a GPU. Example: python loadtests/gpu.py --seconds 480"""
    if table:
        typer.echo(markdown(json.loads(table.read_text(encoding="utf-8"))))
        return
    if unknown := sorted({*(only or ())} - {step.name for step in STEPS}):
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(step.name for step in STEPS)}")
    here = machine()
    if not cpu and "gpu" not in here:
        raise typer.BadParameter("nvidia-smi shows no GPU here; use --cpu to try the same steps on the processors")
    folder = (out or ROOT / "build" / ("gpu-cpu" if cpu else "gpu")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder.open(folder / "gpu.json", here, "cpu" if cpu else "cuda")

    def command(step: Step, rows: Path) -> list[str]:
        options = ["--cpu"] if cpu else []
        return [sys.executable, str(ROOT / "loadtests/gpu_steps.py"), step.name, str(rows), *options]

    longer = 5 if cpu else 1  # processors may have other work
    chosen = [replace(step, share=longer * step.share) for step in STEPS if not only or step.name in only]
    run(chosen, command, recorder, seconds, again, environment())
    typer.echo(f"{recorder.file}; as Markdown: python loadtests/gpu.py --table {recorder.file}")


if __name__ == "__main__":
    typer.run(main)
