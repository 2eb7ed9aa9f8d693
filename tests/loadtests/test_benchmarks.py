"""The engine's benchmark runs and reports what it measured. The measured values are not tested."""

import json
import math
import subprocess
import sys

import pytest

from common import ROOT

VARIANTS = {
    "plain", "plain int8", "ledger", "ledger int8", "ledger, details", "account", "account, heatmap", "torch", "hooks",
    "input x gradient", "integrated gradients",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the benchmarks keep their graphs: the plain ones are the same for all of them."""
    return tmp_path_factory.mktemp("cache")


def test_engine_benchmark_writes_a_row_for_every_variant(cache, tmp_path):
    command = [sys.executable, ROOT / "loadtests/engine.py", "--quick", "--pairs", "1", "--cache", cache]
    finished = subprocess.run(
        [*command, "--json", tmp_path / "rows.json"], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert finished.returncode == 0, finished.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    for batch, expected in (
        (1, VARIANTS),
        (8, VARIANTS - {"torch", "hooks", "input x gradient", "integrated gradients"}),
    ):
        rows_of_batch = [row for row in rows if row["batch"] == batch and "labels" not in row["variant"]]
        assert {row["variant"] for row in rows_of_batch if row["variant"] != "memory"} == expected
    for row in rows:
        if row["variant"] != "memory":
            assert set(row) == {"variant", "shape", "features", "k", "batch", "median_ms", "ratio_to_plain"}
            assert row["median_ms"] > 0
            assert math.isfinite(row["ratio_to_plain"])
    (memory,) = (row for row in rows if row["variant"] == "memory")
    assert memory["peak_bytes"] > memory["weights_bytes"] > 0
    for variant in VARIANTS:
        assert variant in finished.stdout


def test_two_graphs_are_timed_in_turns(bundle_path):
    graph = bundle_path / "vision.onnx"
    command = [sys.executable, ROOT / "loadtests/graphs.py", graph, graph, "--pairs", "3", "--batch", "2"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("second over first: ")


def test_source_benchmark_writes_a_row_for_every_variant(cache, tmp_path):
    command = [sys.executable, ROOT / "loadtests/sources.py", "--quick", "--pairs", "1", "--cache", cache]
    finished = subprocess.run(
        [*command, "--json", tmp_path / "rows.json"], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    counts = ("1 target", "10 targets")
    assert {row["variant"] for row in rows} == {
        "plain", "trace", *(f"{part}, {count}" for part in ("sources", "account") for count in counts)
    }  # fmt: skip
    assert all(row["median_ms"] > 0 for row in rows)


def test_intervention_benchmark_runs(cache):
    command = [sys.executable, ROOT / "loadtests/rerun.py", "--quick", "--pairs", "1", "--cache", cache]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert finished.returncode == 0, finished.stderr
    for variant in ("vision and components", "rerun, nothing", "rerun, 10 features", "rerun, a row"):
        assert variant in finished.stdout
