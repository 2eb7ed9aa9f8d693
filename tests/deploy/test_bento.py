"""bentofile.yaml: `bentoml build` works without a network, and the bento serves its own copy of code and bundle."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image
from requirements import normalised, pins

from common import ROOT, free_port

START_SECONDS = 60  # a bound, not an expectation
NOWHERE = "http://127.0.0.1:9"  # a proxy that never answers: requests to other hosts fail


def environment(home):
    """Without our settings and without the repository on the path; nothing can be downloaded."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("VITRINE_", "PYTHONPATH"))}
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE)
    pip = {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "no_proxy": "127.0.0.1,localhost"}
    return kept | proxies | pip | {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("bentoml")


@pytest.fixture(scope="module")
def bento(home):
    """The bento's folder."""
    command = [sys.executable, "-m", "bentoml", "build", "--output", "tag", "--version", "tried"]
    finished = subprocess.run(command, cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "__tag__:vitrine-service:tried" in finished.stdout
    return home / "bentos" / "vitrine-service" / "tried"


def test_it_holds_the_service_and_the_demo_and_nothing_else(bento):
    files = {path.relative_to(bento / "src").as_posix() for path in (bento / "src").rglob("*") if path.is_file()}
    assert {"service/app.py", "service/web/index.html", "models/bundle/bundle.py", "models/demo/manifest.json"} <= files
    assert {name.split("/")[0] for name in files} == {"LICENSE", "bentofile.yaml", "models", "service", "vitrine"}
    assert not [name for name in files if "__pycache__" in name]


def test_its_requirements_are_the_projects_as_they_are_pinned(bento):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = pins((ROOT / "constraints.txt").read_text().splitlines())
    required = {normalised(line) for line in project["dependencies"] + extras["cpu"] + extras["tracing"]}
    stated = yaml.safe_load((ROOT / "bentofile.yaml").read_text())["python"]["packages"]
    assert pins(stated) == {name: pinned[name] for name in required}
    assert set(stated) <= set((bento / "env/python/requirements.txt").read_text().splitlines())


def test_it_serves_what_it_holds(bento, home, tmp_path):
    port = free_port()
    serve = [sys.executable, "-m", "bentoml", "serve", "vitrine-service:tried"]
    command = [*serve, "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=tmp_path, env=environment(home), stdout=output, stderr=output) as process,
    ):
        try:
            wait_until_ready(process, port, log)
            buffer = io.BytesIO()
            Image.linear_gradient("L").convert("RGB").save(buffer, "PNG")
            body = json.dumps({"image_base64": base64.b64encode(buffer.getvalue()).decode()}).encode()
            answer = json.loads(ask(port, "/v1/attribute", body))
            assert answer["model"]["name"] == "demo"
            assert len(answer["explanations"][0]["ledger"]["clt"]) == 12
            # The bundle's tables stay mapped into memory: they show which copy is being served.
            processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            mapped = {table.path for child in processes for table in child.memory_maps() if table.path.endswith(".npy")}
            assert mapped
            assert {Path(path).parent for path in mapped} == {bento / "src" / "models" / "demo"}
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0, log.read_text()


def wait_until_ready(process, port, log):
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            ask(port, "/readyz")
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"it did not become ready; its log:\n{log.read_text()}")


def ask(port, path, body=None):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
        return response.read()
