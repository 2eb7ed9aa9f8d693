"""The load test: the load that it offers, the figures that it computes from the answers, and a short run."""

import csv
import subprocess
import sys

import pytest

from common import ROOT
from profiles import PROFILES, Step, users_at
from rows import OTHER, Row, by_step, knee, paired, read_rows


def stretch(offered, start, seconds, answered=None, status=200, took=10.0, name="/v1/attribute"):
    """Rows of one offered rate, evenly spaced."""
    rate = answered or offered
    times = [start + place / rate for place in range(round(seconds * rate))]
    return [Row(at, offered, name, status, took, {"decode": 2.0, "inference": 5.0}) for at in times]


def test_a_profile_is_users_over_time():
    profile = (Step(0.5, 10), Step(2.0, 5))
    assert [users_at(profile, 20, 0, at) for at in (0, 9.9, 10, 14.9, 15)] == [10, 10, 40, 40, None]
    assert [users_at(profile, 20, 3, at) for at in (0, 2.9, 3, 5.9, 6)] == [10, 10, 40, 40, None]
    assert users_at(profile, 0.1, 0, 0) == 1
    shares = [step.share for step in PROFILES["step"]]
    assert shares == sorted(shares)
    assert shares[-1] == 2.0


def test_figures_of_a_step_by_hand():
    rows = stretch(10, 100.0, 13, took=10.0) + stretch(20, 113.0, 13, took=30.0)
    first, second = by_step(rows)
    assert (first.offered, second.offered) == (10, 20)
    assert first.answered == pytest.approx(10, rel=0.03)
    assert first.percentiles == {50: 10.0, 90: 10.0, 95: 10.0, 99: 10.0}
    assert second.percentiles[50] == 30.0
    assert second.stages == {"decode": 2.0, "inference": 5.0, OTHER: pytest.approx(23.0)}


def test_refusals_are_no_failures_and_no_answers():
    rows = sorted(
        stretch(10, 0.0, 13)
        + stretch(10, 0.05, 13, answered=2, status=429)
        + stretch(10, 0.02, 13, answered=1, status=500),
        key=lambda row: row.seconds,
    )
    (step,) = by_step(rows)
    assert (step.refused, step.failed) == (20, 10)
    assert step.answered == pytest.approx(10, rel=0.03)
    assert not step.keeps_up, "it failed"


@pytest.mark.parametrize(("refused", "keeps_up"), [(0.4, True), (2, False)])
def test_a_rate_is_kept_up_with_if_hardly_any_are_refused(refused, keeps_up):
    rows = stretch(10, 0.0, 33, answered=10 - refused) + stretch(10, 0.05, 33, answered=refused, status=429)
    (step,) = by_step(sorted(rows, key=lambda row: row.seconds))
    assert step.keeps_up == keeps_up


def test_the_knee_is_the_last_rate_that_was_kept_up_with():
    rows = stretch(10, 0, 13) + stretch(20, 13, 13) + stretch(40, 26, 13, answered=30) + stretch(50, 39, 13)
    assert knee(by_step(rows)).offered == 20, "a larger one after a failure is luck"
    assert knee(by_step(stretch(10, 0, 13, answered=5))) is None


def test_pairs_are_medians_under_the_same_load():
    rows = stretch(10, 0, 10, took=10.0, name="/v1/classify") + stretch(10, 0, 10, took=10.4)
    assert paired(rows) == (10.0, 10.4)
    assert paired(stretch(10, 0, 10)) is None


def run(tmp_path, *options):
    command = [sys.executable, ROOT / "loadtests/latency.py", "--load", "smoke", "--seconds", "6", "--out", tmp_path]
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=180)


def test_a_short_run_writes_rows_and_a_report(tmp_path):
    finished = run(tmp_path, "--rate", "30", "--mix", "mixed")
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-3000:]
    assert "ms of processor time in the service per answer" in finished.stdout
    rows = read_rows(tmp_path / "rows.csv")
    assert {row.status for row in rows} == {200}
    assert {row.offered for row in rows} == {6}
    assert {row.name for row in rows} <= {"/v1/attribute", "/v1/classify", "/v1/attribute:batch"}
    assert all(0 < sum(row.stages.values()) < row.milliseconds for row in rows if row.name != "/v1/attribute:batch")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "<script" not in page
    with (tmp_path / "rows.csv").open() as file:
        assert next(csv.reader(file))[:5] == ["seconds", "offered", "name", "status", "milliseconds"]


def test_a_missed_threshold_is_the_exit_code(tmp_path):
    finished = run(tmp_path, "--rate", "20", "--max-p99", "0.001")
    assert finished.returncode == 1
    assert "missed: p99" in finished.stderr


def test_a_service_that_is_not_there_is_a_failure(tmp_path):
    finished = run(tmp_path, "--url", "http://127.0.0.1:9")
    assert finished.returncode == 1
