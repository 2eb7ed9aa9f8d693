"""The GPU run: its steps, what becomes of those that fail or hang, and that it goes on."""

import json
import shlex
import subprocess
import sys
import time
import tomllib
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import typer

import engine
import gpu
import gpu_engine
import gpu_service
import gpu_steps
import gpu_table
from common import ROOT
from gpu import Recorder, Step
from rows import StepFigures

MACHINE = {"gpu": "One", "packages": {"torch": "1"}}
SCRIPTS = {
    "good": "row({'n': 1}); row({'n': 2})",
    "bad": "row({'n': 3}); print('KeyError: what'); sys.exit(1)",
    "lacking": "print('captum is not installed'); sys.exit(3)",
    "hanging": "row({'n': 4}); file.write('{\"n\": '); file.flush(); "
    "server = subprocess.Popen(['sleep', '60'], start_new_session=True); print('begun', server.pid, flush=True); "
    "time.sleep(60)",
}
HELPER = """
import json, subprocess, sys, time
file = open(sys.argv[1], 'a')
def row(fields):
    file.write(json.dumps(fields) + chr(10)); file.flush()
"""


@pytest.fixture
def record(tmp_path):
    """record() -> what gpu.json says now, opened anew."""
    return lambda: Recorder.open(tmp_path / "gpu.json", MACHINE, "cuda")


@pytest.fixture
def begun():
    """The names of the steps that were begun, in order."""
    return []


@pytest.fixture
def command(begun):
    def make(step, rows):
        begun.append(step.name)
        return [sys.executable, "-I", "-S", "-c", HELPER + SCRIPTS[step.name.partition(" ")[0]], str(rows)]

    return make


def steps_of(record):
    return {name: (step["state"], step["rows"], step.get("reason")) for name, step in record().result["steps"].items()}


def test_each_step_costs_only_itself(record, command, tmp_path):
    steps = (
        Step("bad", 20, 0),
        Step("lacking", 20, 0),
        Step("hanging", 3, 0),
        Step("good after bad", 20, 0, after=("bad",)),
        Step("good", 20, 0),
        Step("good at last", 20, 1000),
    )
    gpu.run(steps, command, record(), 60)
    assert steps_of(record) == {
        "bad": ("failed", [{"n": 3}], "KeyError: what"),
        "lacking": ("skipped", [], "captum is not installed"),
        "hanging": ("failed", [{"n": 4}], "it did not end within 3 s"),
        "good after bad": ("skipped", [], "it requires the step bad, which is not done"),
        "good": ("done", [{"n": 1}, {"n": 2}], None),
        "good at last": ("out of time", [], steps_of(record)["good at last"][2]),
    }
    assert steps_of(record)["good at last"][2].endswith("s were left, but it takes at least 1000 s")
    log = (tmp_path / "hanging.log").read_text()
    assert log.startswith("begun "), "it had started a process of its own session"
    assert not psutil.pid_exists(int(log.split()[1])) or psutil.Process(int(log.split()[1])).status() == "zombie"


def test_a_step_that_the_budget_stops_goes_on_with_the_next_run(record, command, begun):
    gpu.run((Step("hanging", 30, 0), Step("good", 20, 1)), command, record(), 0.8)
    assert [state for state, _, _ in steps_of(record).values()] == ["out of time", "out of time"]
    begun.clear()
    gpu.run((Step("hanging", 0.5, 0), Step("good", 20, 1)), command, record(), 60)
    assert begun == ["hanging", "good"]
    assert [state for state, _, _ in steps_of(record).values()] == ["failed", "done"]


def test_a_second_run_does_what_is_not_done(record, command, begun):
    steps = (Step("good", 20, 0), Step("bad", 20, 0), Step("lacking", 20, 0))
    gpu.run(steps, command, record(), 60)
    begun.clear()
    gpu.run(steps, command, record(), 60)
    assert begun == ["lacking"], "what it lacked may have been installed"
    begun.clear()
    gpu.run(steps, command, record(), 60, again=True)
    assert begun == ["bad", "lacking"]
    assert record().result["steps"]["bad"]["rows"] == [{"n": 3}], "the rows of the last time alone"


def test_what_is_written_is_whole_at_every_moment(record, command, tmp_path, monkeypatch):
    def cut(file, text):
        raise OSError("no space left")

    gpu.run((Step("good", 20, 0),), command, record(), 60)
    before = (tmp_path / "gpu.json").read_text()
    monkeypatch.setattr("vitrine.models.files.writing.replace", cut)
    with pytest.raises(OSError, match="no space left"):
        gpu.run((Step("bad", 20, 0),), command, record(), 60)
    assert (tmp_path / "gpu.json").read_text() == before


@pytest.mark.parametrize(
    ("machine", "provider", "message"),
    [
        (MACHINE, "cpu", "measured with provider cuda, but here it is cpu"),
        (MACHINE | {"gpu": "Two"}, "cuda", "measured with gpu One, but here it is Two"),
        (MACHINE | {"driver": "5"}, "cuda", "measured with driver nothing, but here it is 5"),
    ],
)
def test_rows_of_two_machines_are_not_mixed(record, command, tmp_path, machine, provider, message):
    gpu.run((Step("good", 20, 0),), command, record(), 60)
    with pytest.raises(typer.BadParameter, match=message):
        Recorder.open(tmp_path / "gpu.json", machine, provider)


def test_the_machine_is_what_nvidia_smi_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.gpu() == {}
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\nif [ "$1" ]; then echo "NVIDIA H200, 143771 MiB, 580.1, 9.0"; '
        'else echo "| Driver Version: 580.1   CUDA Version: 13.0 |"; fi\n'
    )
    tool.chmod(0o755)
    assert gpu.gpu() == {
        "gpu": "NVIDIA H200",
        "gpu memory": "143771 MiB",
        "driver": "580.1",
        "compute capability": "9.0",
        "cuda of the driver": "13.0",
    }
    tool.write_text("#!/bin/sh\nexit 9\n")  # the tool without a driver
    assert gpu.gpu() == {}


def test_every_step_has_its_work_and_its_table():
    names = [step.name for step in gpu.STEPS]
    assert names == list(gpu_steps.STEPS)
    assert {name.split("-")[0] for name in names} == set(gpu_table.TABLES)
    for step in gpu.STEPS:
        assert set(step.after) <= set(names[: names.index(step.name)])
        assert step.least < step.share


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    def step(place):
        yield {"provider": place.provider}
        import no_such_package  # noqa: F401

    monkeypatch.setitem(gpu_steps.STEPS, "doctor", step)
    with pytest.raises(typer.Exit) as ended:
        gpu_steps.main("doctor", tmp_path / "rows.jsonl")
    assert ended.value.exit_code == gpu.SKIPPED
    assert "no_such_package is not installed in " in capsys.readouterr().err
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"provider": "cuda"}


def test_one_step_from_the_command_line_to_the_table(tmp_path):
    """The script itself, with this environment in the place of its own."""
    checkout = tmp_path / "checkout"
    (checkout / "build/gpu/.venv/bin").mkdir(parents=True)
    (checkout / "build/gpu/.venv/installed").touch()
    python = checkout / "build/gpu/.venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (checkout / "loadtests").symlink_to(ROOT / "loadtests")
    script, options = checkout / "loadtests/gpu.sh", ["--cpu", "--only", "doctor", "--out", tmp_path / "out"]
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    finished = subprocess.run([script, *options], **run)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.startswith("doctor: done, "), finished.stdout
    result = json.loads((tmp_path / "out/gpu.json").read_text())
    assert result["provider"] == "cpu"
    shown = gpu_table.markdown(result)
    assert shown.startswith(gpu_table.TRIAL)
    assert "the graphs run; one image took " in shown


def test_the_script_installs_what_constraints_and_pyproject_have():
    """Every extra is one of pyproject.toml's, every package a pinned one: pip would ignore an unknown extra."""
    words = shlex.split((ROOT / "loadtests/gpu.sh").read_text(), comments=True)
    after = words[words.index("--editable") + 1 :]
    extras, *packages = [word for part in after[: after.index("then")] if (word := part.strip("; \n"))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.removeprefix(".[").removesuffix("]").split(",")) <= set(project["optional-dependencies"])
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    assert {package.partition("[")[0] for package in packages} <= pinned
    assert packages


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(gpu, "machine", lambda: {})
    with pytest.raises(typer.BadParameter, match="no GPU here; use --cpu"):
        gpu.main(cpu=False, only=None, table=None)
    with pytest.raises(typer.BadParameter, match="'parity' is not one of doctor, parity-demo"):
        gpu.main(cpu=False, only=["parity"], table=None)


def test_parity_of_a_bundle_with_itself(bundle_path):
    (row,) = gpu_engine.parity(bundle_path, "cpu")
    assert (row["precision"], row["provider"], row["tf32"]) == ("fp32", "CPUExecutionProvider", False)
    assert row["logit"] == row["row"] == row["sources"] == 0
    assert row["remainder"] < 1e-4
    assert (row["top1"], row["top_features"]) == (1, 1)
    assert row["nodes"]["elsewhere"] == {}
    assert row["nodes"]["counts"]["CPUExecutionProvider"] > 100


def test_differences_by_hand(bundle):
    reference = gpu_engine.load(bundle, "cpu", "fp32")
    pixels, scale = gpu_engine.pictures(bundle, 2), bundle.manifest.logit_scale
    labels = np.eye(bundle.manifest.shape.embedding, dtype=np.float32)

    def explain(batch):
        for parts in reference.explain(batch):
            rows = parts.rows.copy()
            rows[1] += 0.5  # along every label
            yield replace(parts, rows=rows, embedding=parts.embedding - 0.25)

    found = gpu_engine._differences(reference, SimpleNamespace(explain=explain), [pixels], labels)
    assert found == {
        "logit": pytest.approx(0.25 * scale, rel=1e-5),
        "row": pytest.approx(0.5 * scale, rel=1e-5),
        "remainder": pytest.approx(0.75 * scale, rel=1e-4),
    }


def test_timings_have_a_row_for_every_variant_and_batch(bundle_path, tmp_path, monkeypatch):
    (tmp_path / "quick-plain").mkdir()
    (tmp_path / "quick-plain/fp32.onnx").touch()
    monkeypatch.setattr(gpu_engine, "session", lambda *_: SimpleNamespace(run=lambda names, feeds: time.sleep(0.001)))
    rows = list(gpu_engine.timings(bundle_path, tmp_path, engine.Shape.QUICK, "cpu", (1, 2), 1))
    variants = ("plain", "ledger", "attribution", "sources")
    assert [(row["batch"], row["variant"]) for row in rows] == [(batch, name) for batch in (1, 2) for name in variants]
    assert all(row["median_ms"] > 0 and row["provider"] == "CPUExecutionProvider" for row in rows)


def test_the_ladder_doubles_and_then_closes_in(monkeypatch):
    """The service keeps up with 420 requests a second; p95 triples above 300."""
    asked = []

    def at(server, rate, seconds):
        asked.append(rate)
        p95 = 10.0 if rate <= 300 else 31.0
        percentiles = {50: 5.0, 90: 9.0, 95: p95, 99: 2 * p95}
        return StepFigures(rate, seconds, min(rate, 420.0), 0, 0, percentiles, {}), {"gpu_busy": 0.5}

    monkeypatch.setattr(gpu_service, "serving", lambda *_, **settings: nullcontext(settings))
    monkeypatch.setattr(gpu_service, "_at", at)
    *rates, last = gpu_service.ladder(ROOT, {"VITRINE_WORKERS": "4"}, 50, 6400, 8)
    assert asked == [50, 100, 200, 400, 283, 336]
    assert [row["holds"] for row in rates] == [True, True, True, False, True, False]
    assert last == {"workers": 4, "knee": 400, "steady_to": 283}


def test_the_gpu_counts_only_under_load():
    samples = [gpu_service.Sample(at, busy, size, watts) for at, busy, size, watts in
               ((9, 0.0, 1, 90), (10, 0.4, 5, 300), (11, 0.6, 4, 500), (12, 0.0, 9, 90))]  # fmt: skip
    assert gpu_service._gpu(samples, 10, 11) == {"gpu_busy": 0.5, "gpu_bytes": 5, "gpu_watts": 400}
    assert gpu_service._gpu([], 10, 11) == {}


def test_tables_by_hand():
    at_rate = {"workers": 1, "rate": 250, "answered": 250.0, "refused": 0, "failed": 0, "p50_ms": 4.0, "p95_ms": 9.0,
               "p99_ms": 12.5, "gpu_busy": 0.5, "gpu_watts": 300.0, "gpu_bytes": 2**31, "service_ms_an_answer": 6.0,
               "service_processors": 1.5, "client_processors": 0.4}  # fmt: skip
    timed = {"precision": "fp16", "batch": 8, "median_ms": 2.5, "ratio_to_plain": 1.25}
    trained = {"shape": "b32", "features": 6144, "k": 32, "matmul": "tf32", "tokens": 1600}
    fast = {"sparse_seconds_with_adam": 0.1, "sparse_peak_bytes": 2**30, "sparse_share_of_peak": 0.5}
    steps = {
        "service": [at_rate, {"workers": 1, "knee": 250, "steady_to": 250}],
        "engine": [{"variant": "plain", **timed}, {"variant": "ledger", **timed, "batch": 1}],
        "training-b32": [trained | fast],  # dense does not fit
    }
    done = {name: {"state": "done", "seconds": 9.0, "rows": rows} for name, rows in steps.items()}
    lost = {"state": "failed", "seconds": 1.0, "rows": [], "reason": "KeyError: what"}
    result = {"provider": "cuda", "begun": "2026-12-01T08:00:00", "code": "abc", "machine": MACHINE, "steps": done}
    result["steps"]["tensorrt"] = lost
    lines = gpu_table.markdown(result).splitlines()
    assert lines[0] == "Measured 2026-12-01, code abc, on: gpu One; torch 1."
    for expected in (
        "| 1 | 250 | 250.0 | 0 | 0 | 4.0 | 9.0 | 12.5 | 50% | 300 | 2.0 | 2.00 | 6.0 | 1.5 | 0.4 |",
        "1 worker: knee 250/s.",
        "| plain, fp16 | – | 2.50 (1.25) |",
        "| ledger, fp16 | 2.50 (1.25) | – |",
        "| CLT of b32, F = 6,144, k = 32, tf32 | 1,600 | 100.0 | 16,000 | 1.00 | 50% | – | – |",
        "- tensorrt: failed: KeyError: what",
    ):
        assert expected in lines
