"""`make loadtest`: starts a service, sends it requests of many users, and reports what they saw.

    python loadtests/latency.py --load step --rate 150 --out build/loadtest
    python loadtests/latency.py --url http://gpu-node:3000 --load steady --rate 400 --max-p99 80

The exit code is 1 if a threshold is missed: `--max-p99` (milliseconds), `--max-refused`, `--max-failed` (shares of
all answers), `--min-answered` (share of the offered requests). Loads: `loadtests/profiles.py`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from latency_report import write_report
from profiles import PROFILES
from rows import Row, StepFigures, by_step, knee, paired, read_rows
from server import Server, serving

ROOT = Path(__file__).resolve().parents[1]


def main(
    load: Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")] = "steady",
    rate: Annotated[float, typer.Option(min=1, help="Requests per second that the load is based on.")] = 20,
    mix: Annotated[
        str, typer.Option(help="classify, attribute, batch, mixed; or paired: the first two in turns.")
    ] = "attribute",
    seconds: Annotated[float, typer.Option(min=0, help="Seconds of every step; 0: as in the load.")] = 0,
    bundle: Annotated[Path | None, typer.Option(help="Bundle to serve; default: the embedded one.")] = None,
    url: Annotated[str | None, typer.Option(help="URL of a running service, instead of starting one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for rows.csv and report.html.")] = Path("build/loadtest"),
    max_p99: Annotated[float | None, typer.Option(help="Allowed p99 of the answers, in milliseconds.")] = None,
    max_refused: Annotated[float, typer.Option(help="Allowed share of answers with 429.")] = 1.0,
    max_failed: Annotated[float, typer.Option(help="Allowed share of answers other than 200 and 429.")] = 0.0,
    min_answered: Annotated[
        float, typer.Option(help="Required share of the offered requests that are answered.")
    ] = 0.0,
) -> None:
    """Put a load on a service, and write what its clients saw."""
    if load not in PROFILES:
        raise typer.BadParameter(f"{load!r} is not one of {', '.join(PROFILES)}", param_hint="--load")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "rows.csv"
    file.unlink(missing_ok=True)
    with _service(bundle, url) as (address, server):
        before = server.processor_seconds() if server else 0.0
        drive(address, mix, load, rate, seconds, file)
        used = server.processor_seconds() - before if server else None
    if not file.exists():
        raise typer.Exit(1)  # locust has logged the reason
    rows = read_rows(file)
    steps = by_step(rows)
    if not steps:
        typer.echo(f"error: {len(rows)} answers are too few; make the steps longer", err=True)
        raise typer.Exit(1)
    title = f"{mix}, {load} load, {rate:g} requests per second"
    if used is not None and (answers := sum(row.status == 200 for row in rows)):
        cost = f"{used / answers * 1e3:.1f} ms of processor time in the service per answer"
        title = f"{title}; {cost}"
        print(cost)
    report = write_report(out / "report.html", steps, rows, title)
    for step in steps:
        shown = ", ".join(f"p{at} {value:.1f}" for at, value in step.percentiles.items())
        print(
            f"offered {step.offered}/s: answered {step.answered:.1f}/s, {step.refused} refused, {step.failed} failed; "
            f"{shown} ms"
        )
    if (limit := knee(steps)) and len(steps) > 1:
        print(f"knee: {limit.offered} requests per second")
    if pair := paired(rows):
        print(f"classify p50 {pair[0]:.2f} ms, attribute {pair[1]:.2f} ms: {pair[1] / pair[0] - 1:+.1%}")
    print(report)
    if missed := _missed(rows, steps, max_p99, max_refused, max_failed, min_answered):
        typer.echo("missed: " + "; ".join(missed), err=True)
        raise typer.Exit(1)


@contextmanager
def _service(bundle: Path | None, url: str | None) -> Iterator[tuple[str, Server | None]]:
    """The service's address, and the server if it was started here."""
    if url:
        yield url.rstrip("/"), None
    else:
        with serving(bundle) as server:
            yield server.url, server


def drive(url: str, mix: str, load: str, rate: float, seconds: float, rows: Path) -> None:
    """Load the service at `url` (`main` says what the others are), and write every answer to the CSV file `rows`.

    locust runs in a separate process: it patches sockets and threads.
    """
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests/locustfile.py"), "--headless"]
    command += ["--only-summary", "--host", url, "--stop-timeout", "30", "--exit-code-on-error", "0"]
    command += ["--mix", mix, "--load", load, "--rate", str(rate), "--seconds", str(seconds), "--rows", str(rows)]
    subprocess.run(command, cwd=ROOT, check=False)  # noqa: S603


def _missed(
    rows: list[Row],
    steps: list[StepFigures],
    max_p99: float | None,
    max_refused: float,
    max_failed: float,
    min_answered: float,
) -> list[str]:
    """Descriptions of the missed thresholds."""
    refused = sum(row.status == 429 for row in rows) / len(rows)
    failed = sum(row.status not in (200, 429) for row in rows) / len(rows)
    worst = max(step.percentiles[99] for step in steps)
    answered = min(step.answered / step.offered for step in steps)
    missed = []
    if max_p99 is not None and not worst <= max_p99:
        missed.append(f"p99 {worst:.1f} ms, {max_p99:g} allowed")
    if refused > max_refused:
        missed.append(f"{refused:.1%} refused, {max_refused:.1%} allowed")
    if failed > max_failed:
        missed.append(f"{failed:.1%} failed, {max_failed:.1%} allowed")
    if answered < min_answered:
        missed.append(f"{answered:.1%} of the offered requests answered, {min_answered:.1%} required")
    return missed


if __name__ == "__main__":
    typer.run(main)
