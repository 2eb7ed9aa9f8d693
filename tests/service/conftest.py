"""Real server processes on the tiny bundle, the engine alone, and generated image files."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from common import ROOT, free_port
from vitrine.service.engine.engine import Engine
from vitrine.service.operations.settings import Settings
from vitrine.service.processes import workers

START_SECONDS = 60  # an upper bound; it starts in about 5


@pytest.fixture(scope="session")
def light_python():
    """The interpreter that runs the service: one without torch when VITRINE_LIGHT_PYTHON names it."""
    return os.environ.get("VITRINE_LIGHT_PYTHON", sys.executable)


@pytest.fixture(scope="session")
def run_python(light_python):
    """run_python(*arguments, **environment) -> the finished process, in the repository, with the service's Python."""

    def run(*arguments, python=light_python, **environment):
        command, environment = [python, *map(str, arguments)], _environment(**environment)
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=START_SECONDS)

    return run


def _environment(**more):
    """The environment of this process without its own VITRINE_ settings."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("VITRINE_")}
    inherited.pop("PROMETHEUS_MULTIPROC_DIR", None)
    return inherited | {"BENTOML_DO_NOT_TRACK": "True"} | {k: str(v) for k, v in more.items()}


class Server:
    """A running `bentoml serve`. Each request uses its own connection, so that tests do not affect each other."""

    def __init__(self, port, process, log):
        self.port, self.process, self.log = port, process, log
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=30, limits=httpx.Limits(max_keepalive_connections=0)
        )

    def post(self, path, image=None, request=None, **headers):
        """Multipart: `image` as a file part, `request` (a dict, or JSON text) as a JSON part."""
        files = {} if image is None else {"image": ("image", image)}
        if request is not None:
            files["request"] = (None, request if isinstance(request, str) else json.dumps(request))
        return self.http.post(path, files=files, headers=headers)

    def post_json(self, path, image, **fields):
        """JSON: the image in base64 beside the other fields."""
        return self.post_text(json.dumps({"image_base64": base64.b64encode(image).decode(), **fields}), path)

    def post_text(self, text, path="/v1/attribute"):
        """Any text, sent as JSON."""
        return self.http.post(path, content=text, headers={"content-type": "application/json"})

    def attribute(self, image, **request):
        """The answer to a request that must succeed."""
        response = self.post("/v1/attribute", image, request)
        assert response.status_code == 200, response.text
        return response.json()

    def wait_until_ready(self):
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.http.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        pytest.fail(f"the server did not become ready; its log:\n{self.log.read_text()}")

    @property
    def workers(self):
        """The worker processes."""
        return workers.worker_processes(self.process.pid)

    def stop(self):
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="session")
def start_server(light_python, tmp_path_factory):
    """start_server(**environment) -> context manager of a `Server`, ready, by `vitrine serve`.

    command: the command to start instead; python: its interpreter. A separate BENTOML_HOME keeps the metrics apart.
    """

    @contextmanager
    def start(command=("-m", "vitrine", "serve"), python=light_python, **environment):
        home, port = tmp_path_factory.mktemp("bentoml"), free_port()
        log = home / "serve.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [python, *map(str, command), "--host", "127.0.0.1", "--port", str(port)],
                cwd=ROOT,
                env=_environment(**{"BENTOML_HOME": home} | environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running = Server(port, process, log)
        try:
            running.wait_until_ready()
            yield running
        finally:
            running.stop()

    return start


@pytest.fixture(scope="session")
def server(carded, start_server, tmp_path_factory):
    """A `bentoml serve` on the tiny bundle with cards, shared by all tests."""
    label_sets = tmp_path_factory.mktemp("label-sets")
    (label_sets / "pets.json").write_text('{"labels": ["cat", "dog"], "templates": ["a photo of my {}"]}')
    command = ("-m", "bentoml", "serve", "vitrine.service.app:Vitrine")
    with start_server(command, VITRINE_BUNDLE=carded.path, VITRINE_LABEL_SETS=label_sets) as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Show what the server logged during a test beside its failure."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if server and report.when == "setup":
        item.log_start = server.log.stat().st_size
    elif server and report.failed:
        report.sections.append(("server log", server.log.read_text()[item.log_start :]))
    return report


@pytest.fixture(scope="session")
def settings(bundle_path):
    return Settings(bundle=bundle_path)


@pytest.fixture(scope="session")
def engine(bundle, settings):
    return Engine(bundle, settings)


@pytest.fixture
def gate(monkeypatch):
    """An event that every inference waits for; it is set until a test clears it."""
    explain, gate = Engine.explain, threading.Event()
    gate.set()
    monkeypatch.setattr(Engine, "explain", lambda self, *batch: gate.wait(30) and explain(self, *batch))
    yield gate
    gate.set()


@pytest.fixture
def refused(server, picture):
    """refused(response, status, code) checks the status and the error envelope, and that a normal request succeeds."""

    def check(response, status, code):
        assert response.status_code == status, response.text[:500]
        assert response.headers["content-type"] == "application/json"
        assert list(response.json()) == ["error"]
        error = response.json()["error"]
        assert set(error) == {"code", "message", "details", "request_id"}
        assert error["code"] == code
        assert error["message"]
        assert isinstance(error["details"], list)
        assert error["request_id"] == response.headers["x-request-id"]
        assert "Traceback" not in response.text
        assert len(response.content) < 100_000, "a small mistake must not be answered at length"
        assert server.attribute(picture())["predictions"]
        return error

    return check
