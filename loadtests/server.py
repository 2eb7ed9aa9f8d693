"""A server for the other load tests: `vitrine serve` in its own process group, which ends with the context."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from vitrine.service.processes import workers

START_SECONDS = 120
CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def workers(self) -> list[psutil.Process]:
        return workers.worker_processes(self.process.pid)

    def resident_mib(self) -> float:
        """Resident memory of all workers and of the processes that they started, in MiB."""
        total = 0
        for worker in self.workers:
            for process in (worker, *worker.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        return total / 2**20

    def processor_seconds(self) -> float:
        """Processor time that the parent and all workers have used so far."""
        parent = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
        return sum(time.user + time.system for time in times)


@contextmanager
def serving(bundle: Path | None, checkout: Path = CHECKOUT, **settings: str) -> Iterator[Server]:
    """A ready server.

    Args:
        checkout: whose code it runs, with the packages of this Python.
        settings: `VITRINE_...` variables.

    Raises RuntimeError with its log if it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        log = Path(home) / "serve.log"
        command = [sys.executable, "-m", "vitrine", "serve", "--port", str(port)]
        command += ["--bundle", str(bundle.resolve())] if bundle else []
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603
                command,
                cwd=checkout,
                env={**os.environ, "PYTHONPATH": str(checkout), "BENTOML_HOME": home, **settings},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            _wait_until_ready(server)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_ready(server: Server) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        try:
            if httpx.get(f"{server.url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the server did not become ready:\n{server.log.read_text()}")
