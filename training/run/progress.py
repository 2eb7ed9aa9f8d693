"""Progress of a run: on the console, log.jsonl, TensorBoard, optionally Weights & Biases. First process only."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from vitrine.models.errors import VitrineError
from vitrine.models.files.problems import naming
from vitrine.models.files.writing import write_text
from vitrine.models.progress import Progress, Task

EVERY = 20  # steps between points of a curve


class StepMetrics(NamedTuple):
    """Metrics of one step, over all processes."""

    loss: float  # the value that is minimised
    r2: float  # mean over layers; a CLT's without outliers; SAEs': standardised tokens
    l0: float  # active features per token and layer
    dead: int  # features that have not fired for `revive_after` tokens
    rate: float  # learning rate
    r2_by_layer: list[float]
    l0_by_layer: list[float]
    r2_cls: float | None = None  # mean over layers; None: no [CLS] among the step's tokens, or not known
    replaced: bool = False  # the R² are under replacement, as in a cascade


class Report:
    """Created by `track_progress`; `add` is called once per step."""

    def __init__(self, task: Task, log: Any, board: SummaryWriter | None, remote: Any) -> None:
        self.task, self.log, self.board, self.remote = task, log, board, remote
        self._last = time.perf_counter()
        self._since = (self._last, 0)

    def add(self, step: int, metrics: StepMetrics, tokens: int) -> None:
        """step: number of completed steps; tokens: in this step."""
        of_cls = "" if metrics.r2_cls is None else f"  [CLS] {metrics.r2_cls:.4f}"
        self.task.advance(
            step - self.task.done,
            f"loss {metrics.loss:.4f}  R² {'replaced ' * metrics.replaced}{metrics.r2:.4f}{of_cls}  "
            f"L0 {metrics.l0:.1f}  dead {metrics.dead:,}",
        )
        if self.log is None:
            return
        now, scalars = time.perf_counter(), _scalars(metrics)
        line = {
            "step": step,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "tokens_per_second": round(tokens / max(now - self._last, 1e-9), 1),
        }
        self._last = now
        with naming(Path(self.log.name)):
            self.log.write(json.dumps(line | scalars) + "\n")
        start, seen = self._since
        self._since = (start, seen + tokens)
        if step % EVERY:
            return
        curves = {**scalars, "tokens_per_second": (seen + tokens) / (now - start)}
        r2 = _name("r2", metrics)
        for layer, (of_r2, l0) in enumerate(zip(metrics.r2_by_layer, metrics.l0_by_layer, strict=True)):
            curves |= {f"{r2}/layer_{layer:02}": of_r2, f"l0/layer_{layer:02}": l0}
        self._since = (now, 0)
        assert self.board is not None
        with naming(Path(self.board.log_dir)):
            for name, value in curves.items():
                self.board.add_scalar(name, value, step)
        if self.remote is not None:
            self.remote.log(curves, step=step)

    def flush(self) -> None:
        if self.log is not None:
            with naming(Path(self.log.name)):
                self.log.flush()


def _scalars(metrics: StepMetrics) -> dict[str, float]:
    """The fields of log.jsonl, which are TensorBoard's curves, too (training/README.md)."""
    values = {
        "loss": metrics.loss,
        _name("r2", metrics): metrics.r2,
        _name("r2_cls", metrics): metrics.r2_cls,
        "l0": metrics.l0,
        "dead": metrics.dead,
        "rate": metrics.rate,
    }
    return {name: value for name, value in values.items() if value is not None}


def _name(r2: str, metrics: StepMetrics) -> str:
    """Under replacement it is another quantity, and has another name."""
    return r2.replace("r2", "r2_replaced") if metrics.replaced else r2


@contextmanager
def track_progress(
    out: Path, step: int, steps: int, console: Console, *, first: bool, wandb_project: str | None, name: str
) -> Iterator[Report]:
    """A `Report` for a run that continues from `step`. On processes other than the first it writes nothing.

    Raises `FileError` if `out` cannot be written, `VitrineError` if Weights & Biases is requested and not installed, or
    fails.
    """
    with ExitStack() as stack:
        log, board, remote = None, None, None
        if first:
            with naming(out):
                out.mkdir(parents=True, exist_ok=True)
            remote = stack.enter_context(_wandb(wandb_project, name, out)) if wandb_project else None
            # The point at `step` itself belongs to the checkpoint that is resumed; later points are computed again.
            board = stack.enter_context(_board(out / "tensorboard", step + 1))
            log = stack.enter_context(_log(out / "log.jsonl", step))
        progress = stack.enter_context(Progress(console if first else Console(quiet=True)))
        yield Report(progress.task("train", steps, "steps", step), log, board, remote)


@contextmanager
def _board(folder: Path, purge_step: int) -> Iterator[SummaryWriter]:
    """TensorBoard's writer. What its thread cannot write is raised here, at the next point or at the end."""
    hook = threading.excepthook
    threading.excepthook = lambda args: None if args.exc_type is OSError else hook(args)  # it would print a traceback
    try:
        with naming(folder):
            board = SummaryWriter(str(folder), purge_step=purge_step)
        try:
            yield board
        finally:
            with naming(folder):
                board.close()
    finally:
        threading.excepthook = hook


@contextmanager
def _log(file: Path, step: int) -> Iterator[Any]:
    """log.jsonl, one line per step, without lines written after the checkpoint from which the run is resumed."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    kept = [line for line in lines if _is_complete(line) and json.loads(line)["step"] <= step]
    if kept != lines:
        write_text(file, "".join(kept))
    with naming(file):
        log = file.open("a", encoding="utf-8")
    try:
        yield log
    finally:
        with naming(file):
            log.close()


def _is_complete(line: str) -> bool:
    """False if the process was killed while it wrote this line."""
    return line.endswith("\n")


@contextmanager
def _wandb(project: str, name: str, out: Path) -> Iterator[Any]:
    """A run of Weights & Biases; its id is stored in `out`, so that resuming continues the same run.

    Points that were sent before a kill are not sent again; they would be the same numbers.
    """
    try:
        import wandb
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
        raise VitrineError("wandb is not installed: pip install 'vitrine[wandb]', or omit --wandb") from error
    file = out / "wandb-id.txt"
    if not file.exists():
        write_text(file, uuid.uuid4().hex[:12])
    try:
        run = wandb.init(project=project, name=name, dir=str(out), id=file.read_text().strip(), resume="allow")
    except wandb.Error as error:
        raise VitrineError(f"Weights & Biases refuses: {error}; fix that, or omit --wandb") from error
    exit_code = 1
    try:
        yield run
        exit_code = 0
    finally:  # wandb's own context manager would print a traceback
        run.finish(exit_code=exit_code)
