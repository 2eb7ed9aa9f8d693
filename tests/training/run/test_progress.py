"""The logs and curves that a run writes, and the files that it leaves alone."""

import io
import json
import os
import re
import socket
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from documents import table
from vitrine.models.errors import VitrineError
from vitrine.training.run import progress
from vitrine.training.run.progress import StepMetrics, track_progress

QUIET = Console(quiet=True)
FIELD = re.compile(r"`(\w+)`").findall


def metrics(step, **changes):
    values = {"loss": 1 / step, "r2": 0.5, "l0": 8.0, "dead": 1234, "rate": 1e-3, "r2_cls": 0.25}
    return StepMetrics(**values, r2_by_layer=[0.4, 0.6], l0_by_layer=[7.0, 9.0])._replace(**changes)


def run_steps(out, start, stop, steps=100, console=QUIET, tokens=100, **changes):
    """Steps start + 1 to stop of a run that is resumed at `start`; returns what the bar showed last."""
    options = {"first": True, "wandb_project": None, "name": "test"} | changes
    with track_progress(out, start, steps, console, **options) as report:
        for step in range(start + 1, stop + 1):
            report.add(step, metrics(step), tokens)
        return report.task.note


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def curves(out):
    """{tag: {step: value}} as TensorBoard shows them."""
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


# log.jsonl


def test_log_has_a_line_a_step(tmp_path):
    run_steps(tmp_path / "new" / "run", 0, 3)
    first, *_ = lines = log(tmp_path / "new" / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert datetime.fromisoformat(first.pop("time")).utcoffset() == timedelta(0)
    assert first.pop("tokens_per_second") > 0
    assert first == {"step": 1, "loss": 1.0, "r2": 0.5, "r2_cls": 0.25, "l0": 8.0, "dead": 1234, "rate": 1e-3}


def test_r2_under_replacement_has_a_name_of_its_own(tmp_path):
    with track_progress(tmp_path, 0, 20, QUIET, first=True, wandb_project=None, name="test") as report:
        for step in range(1, 21):
            report.add(step, metrics(step, replaced=step > 10, r2_cls=None if step == 1 else 0.25), 100)
        assert "R² replaced 0.5000  [CLS] 0.2500" in report.task.note
    first, second, *_, last = log(tmp_path)
    assert "r2_cls" not in first
    assert (second["r2"], second["r2_cls"], last["r2_replaced"], last["r2_replaced_cls"]) == (0.5, 0.25, 0.5, 0.25)
    assert not {"r2", "r2_cls"} & last.keys()
    assert {"r2_replaced", "r2_replaced_cls", "r2_replaced/layer_01"} < curves(tmp_path).keys()
    assert "r2" not in curves(tmp_path)


def test_its_fields_are_the_readmes(tmp_path):
    with track_progress(tmp_path, 0, 2, QUIET, first=True, wandb_project=None, name="test") as report:
        report.add(1, metrics(1), 100)
        report.add(2, metrics(2, replaced=True), 100)
    shown = {name for cell, _ in table("training/README.md", "field of `log.jsonl`", "meaning") for name in FIELD(cell)}
    assert shown == {field for line in log(tmp_path) for field in line}


def test_log_is_cut_at_the_checkpoint(tmp_path):
    run_steps(tmp_path, 0, 9)
    run_steps(tmp_path, 6, 8)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    run_steps(tmp_path, 0, 2)
    assert [line["step"] for line in log(tmp_path)] == [1, 2]


def test_log_is_cut_by_step_and_not_by_lines(tmp_path):
    """After someone removed the first half."""
    run_steps(tmp_path, 0, 9)
    kept = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)[4:]
    (tmp_path / "log.jsonl").write_text("".join(kept))
    run_steps(tmp_path, 6, 7)
    assert [line["step"] for line in log(tmp_path)] == [5, 6, 7]


def test_half_a_line_is_removed(tmp_path):
    run_steps(tmp_path, 0, 3)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run_steps(tmp_path, 3, 4)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4]


def test_log_is_whole_at_every_moment(tmp_path, monkeypatch):
    """Killed while it is cut, before the new file replaces it: nothing is lost."""
    run_steps(tmp_path, 0, 9)
    before = (tmp_path / "log.jsonl").read_text()

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            run_steps(tmp_path, 6, 7)
    assert (tmp_path / "log.jsonl").read_text() == before


def test_flush_brings_lines_to_disk(tmp_path):
    with track_progress(tmp_path, 0, 10, QUIET, first=True, wandb_project=None, name="test") as report:
        report.add(1, metrics(1), 1)
        report.flush()
        assert [line["step"] for line in log(tmp_path)] == [1]


def test_finished_runs_files_are_left_alone(tmp_path):
    run_steps(tmp_path, 0, 40, steps=40)
    before, stamp = curves(tmp_path), (tmp_path / "log.jsonl").stat().st_mtime_ns
    run_steps(tmp_path, 40, 40, steps=40)
    assert (tmp_path / "log.jsonl").stat().st_mtime_ns == stamp
    assert curves(tmp_path) == before


# TensorBoard


def test_curves(tmp_path):
    run_steps(tmp_path, 0, 45)
    points_by_tag = curves(tmp_path)
    layers = {f"{name}/layer_{layer:02}" for name in ("r2", "l0") for layer in (0, 1)}
    assert set(points_by_tag) == {"loss", "r2", "r2_cls", "l0", "dead", "rate", "tokens_per_second"} | layers
    assert all(set(points) == {20, 40} for points in points_by_tag.values())
    assert points_by_tag["loss"] == pytest.approx({20: 1 / 20, 40: 1 / 40})
    assert (points_by_tag["l0/layer_00"][20], points_by_tag["l0/layer_01"][20]) == (7, 9)


def test_curves_after_the_checkpoint_are_replaced(tmp_path):
    """Resumed at 40: the point of step 40 stays, those of 60 and 80 are removed."""
    run_steps(tmp_path, 0, 85)
    assert set(curves(tmp_path)["loss"]) == {20, 40, 60, 80}
    run_steps(tmp_path, 40, 45)
    assert set(curves(tmp_path)["loss"]) == {20, 40}
    run_steps(tmp_path, 45, 65)
    assert set(curves(tmp_path)["loss"]) == {20, 40, 60}


def test_curves_of_a_restarted_run(tmp_path):
    run_steps(tmp_path, 0, 60)
    run_steps(tmp_path, 0, 20)
    assert set(curves(tmp_path)["loss"]) == {20}


def test_tokens_per_second(tmp_path, monkeypatch):
    """By this clock 100 tokens take 1 s, after step 40 2 s: the rate since the last point, whether resumed or not."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    for start, stop in ((0, 45), (30, 60)):
        with track_progress(tmp_path, start, 100, QUIET, first=True, wandb_project=None, name="test") as report:
            for step in range(start + 1, stop + 1):
                now[0] += 1.0 if step <= 40 else 2.0
                report.add(step, metrics(step), 100)
        now[0] += 1000
    assert curves(tmp_path)["tokens_per_second"] == {20: 100, 40: 100, 60: 50}


# The bar


def test_bar_shows_where_the_run_is(tmp_path):
    screen = io.StringIO()
    shown = run_steps(tmp_path, 30, 35, console=Console(file=screen, force_terminal=True, width=150))
    assert shown == f"loss {1 / 35:.4f}  R² 0.5000  [CLS] 0.2500  L0 8.0  dead 1,234"
    assert "35/100" in screen.getvalue()
    assert "dead 1,234" in screen.getvalue()


def test_other_processes_print_and_write_nothing(tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=150)
    shown = run_steps(tmp_path / "run", 0, 45, console=console, first=False, wandb_project="never imported")
    assert shown.startswith("loss 0.0222")
    assert screen.getvalue() == ""
    assert not (tmp_path / "run").exists()


def test_files_are_closed_when_training_fails(tmp_path):
    def fail():
        with track_progress(tmp_path, 0, 100, QUIET, first=True, wandb_project=None, name="test") as report:
            reports.append(report)
            for step in range(1, 21):
                report.add(step, metrics(step), 1)
            raise MemoryError

    reports = []
    with pytest.raises(MemoryError):
        fail()
    assert reports[0].log.closed
    assert len(log(tmp_path)) == 20
    assert set(curves(tmp_path)["loss"]) == {20}


# Weights & Biases


class Remote:
    """A stand-in for the wandb package."""

    Error = RuntimeError

    def __init__(self, refuse=None):
        self.refuse, self.started, self.logged, self.exit_codes = refuse, [], [], []

    def init(self, **options):
        if self.refuse:
            raise self.Error(self.refuse)
        assert Path(options["dir"]).is_dir()  # else wandb takes the system's temporary folder
        self.started.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


@pytest.fixture
def remote(monkeypatch):
    stand_in = Remote()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_points_are_sent_as_tensorboard_gets_them(tmp_path, remote):
    run_steps(tmp_path / "run", 0, 45, wandb_project="vitrine")
    assert [step for step, _ in remote.logged] == [20, 40]
    points_by_tag = curves(tmp_path / "run")
    assert remote.logged[1][1] == pytest.approx({tag: points[40] for tag, points in points_by_tag.items()})
    assert remote.exit_codes == [0]
    assert (remote.started[0]["project"], remote.started[0]["name"]) == ("vitrine", "test")


def test_resumed_run_is_the_same_run_there(tmp_path, remote):
    """Two folders of the same name are two runs; any recipe's name will do."""
    for out, start in ((tmp_path / "run", 0), (tmp_path / "run", 5), (tmp_path / "other" / "run", 0)):
        run_steps(out, start, start + 5, wandb_project="vitrine", name="b/32: #1?")
    first, again, other = (options["id"] for options in remote.started)
    assert first == again != other
    assert first.isalnum()
    assert {options["resume"] for options in remote.started} == {"allow"}


def test_failure_is_reported_there(tmp_path, remote):
    with (
        pytest.raises(KeyboardInterrupt),
        track_progress(tmp_path, 0, 100, QUIET, first=True, wandb_project="vitrine", name="test"),
    ):
        raise KeyboardInterrupt
    assert remote.exit_codes == [1]


def test_refusal_is_reported_before_anything_is_shown(tmp_path, remote):
    remote.refuse, screen = "no API key", io.StringIO()
    with pytest.raises(VitrineError, match="Weights & Biases refuses: no API key; fix that, or omit --wandb"):
        run_steps(tmp_path, 0, 5, console=Console(file=screen), wandb_project="vitrine")
    assert screen.getvalue() == ""


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(VitrineError, match=r"pip install 'vitrine\[wandb\]', or omit --wandb"):
        run_steps(tmp_path, 0, 5, wandb_project="vitrine")


OFFLINE = """
import sys
import time
from pathlib import Path
from rich.console import Console
from vitrine.models.errors import VitrineError
from vitrine.training.run.progress import StepMetrics, track_progress

def go(project, start, stop):
    console, out = Console(quiet=True), Path(sys.argv[1])
    with track_progress(out, start, 100, console, first=True, wandb_project=project, name="b/32: #1?") as report:
        for step in range(start + 1, stop + 1):
            report.add(step, StepMetrics(1.0, 0.5, 8.0, 0, 1e-3, [0.5], [8.0]), 100)

try:
    go("no/such:project", 0, 1)
except VitrineError as error:
    print(error)
go("vitrine", 0, 25)
time.sleep(1.5)  # wandb names an offline folder by the second, and two runs of one second overwrite each other
go("vitrine", 20, 45)
"""


def test_with_wandb_itself(tmp_path):
    """Offline: no connection is made, and only the run's folder (and wandb's own log in its home) is written to."""
    pytest.importorskip("wandb")
    home, scratch, out = tmp_path / "home", tmp_path / "scratch", tmp_path / "work" / "run"
    for folder in (home, scratch, out.parent):
        folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "XDG"))} | {
            "WANDB_MODE": "offline",
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HOME": str(home),
            "TMPDIR": str(scratch),
        }
        command = [sys.executable, "-c", OFFLINE, str(out)]
        finished = subprocess.run(
            command, cwd=out.parent, env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "Weights & Biases refuses: " in finished.stdout
    (key,) = (file.read_text() for file in out.glob("wandb-id.txt"))
    assert len(list(out.glob(f"wandb/offline-run-*-{key}/run-{key}.wandb"))) == 2
    elsewhere = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(out)]
    assert [path for path in elsewhere if not path.is_relative_to(home / ".cache" / "wandb" / "logs")] == []
