"""The dashboard: every query of every panel has data in a real Prometheus that scrapes a real `vitrine serve`."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from common import ROOT, free_port

DEPLOY = ROOT / "deploy"
START_SECONDS = 60
IMAGES = 160  # the hourly rules need more than a hundred
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]


@contextmanager
def running(command, url, log, **environment):
    """The process of `command`, once `url` answers 200; SIGTERM at the end."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("VITRINE_")}
    inherited.pop("PROMETHEUS_MULTIPROC_DIR", None)
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=inherited | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: process.poll() is None and httpx.get(url, timeout=30).status_code == 200, log.read_text)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(condition, describe):
    """Fails with the text of `describe()` unless `condition()` becomes true within START_SECONDS."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        with suppress(httpx.TransportError):
            if condition():
                return
        time.sleep(0.2)
    pytest.fail(f"it did not come about in {START_SECONDS} s: {describe()}")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """(address, process) of `vitrine serve` on the embedded bundle."""
    home, address = tmp_path_factory.mktemp("service"), f"127.0.0.1:{free_port()}"
    host, port = address.split(":")
    python = os.environ.get("VITRINE_LIGHT_PYTHON", sys.executable)
    command = (python, "-m", "vitrine", "serve", "--host", host, "--port", port)
    environment = {"BENTOML_HOME": str(home)}
    with running(command, f"http://{address}/readyz", home / "log", **environment) as process:
        yield address, process


@pytest.fixture(scope="module")
def prometheus(find_program, service, tmp_path_factory):
    """query(expression) -> results of a Prometheus with our rules and scrape configuration, at short intervals.

    It has seen every kind of traffic that a panel shows: answers, refusals, a reload.
    """
    program, folder, (address, server) = find_program("prometheus"), tmp_path_factory.mktemp("prometheus"), service
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [address]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port()}"
    command = (
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={url.removeprefix('http://')}",
    )

    def query(expression):
        response = httpx.get(f"{url}/api/v1/query", params={"query": expression}, timeout=30)
        assert response.status_code == 200, response.text
        return response.json()["data"]["result"]

    with running(command, f"{url}/-/ready", folder / "log"):
        send_traffic(f"http://{address}", 1)
        # An increase needs a first value: it must be scraped before the rest is sent.
        wait_until(lambda: query("vitrine_fidelity_r2_count > 0"), (folder / "log").read_text)
        server.send_signal(signal.SIGHUP)
        send_traffic(f"http://{address}", IMAGES)
        yield query


def send_traffic(url, images):
    """`images` accounts, with sources, in batches of forty, one alone; one request for a prediction, one refused."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    picture = ("image", ("image.png", buffer.getvalue()))
    request = ("request", (None, json.dumps({"explain": {"sources": True}})))
    with httpx.Client(base_url=url, timeout=60) as client:
        for start in range(0, images - 1, 40):
            batch = [picture] * min(40, images - 1 - start)
            assert client.post("/v1/attribute:batch", files=[*batch, request]).status_code == 200
        assert client.post("/v1/attribute", files=[picture, request]).status_code == 200
        assert client.post("/v1/classify", files=[picture]).status_code == 200
        assert client.post("/v1/attribute", files=[("image", b"no image")]).status_code == 415


def filled_in(expression):
    """The query as Grafana sends it, with its variables' values; an hour covers the traffic even if a test is late."""
    values = {"job": "vitrine", "namespace": ".*", "__rate_interval": "1h"}
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], expression)


@pytest.mark.parametrize("expression", QUERIES)
def test_every_query_has_data(prometheus, expression):
    """Eventually: each group of rules is evaluated at its own time, and a rule over others' results one round later."""

    def has_data():
        return any(result["value"][1] != "NaN" for result in prometheus(filled_in(expression)))

    wait_until(has_data, lambda: f"{expression}: {prometheus(filled_in(expression))}")


def test_the_query_of_the_alerts_is_one_that_prometheus_takes(prometheus):
    (annotation,) = DASHBOARD["annotations"]["list"]
    assert prometheus(filled_in(annotation["expr"])) == []


def test_every_family_of_metrics_that_the_service_exposes_has_a_panel(service):
    """A metric that is not shown would be forgotten."""
    address, _ = service
    send_traffic(f"http://{address}", 1)
    exposed = set(re.findall(r"^# TYPE (\S+)", httpx.get(f"http://{address}/metrics").text, re.MULTILINE))
    shown = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"]
    shown += " ".join(rule["expr"] for group in rules for rule in group["rules"] if rule.get("record", "-") in shown)
    assert exposed
    assert not {name for name in exposed if name not in shown}


def test_the_panels_are_distinct_explained_and_do_not_overlap():
    for key in ("id", "title"):
        values = [panel[key] for panel in DASHBOARD["panels"]]
        assert len(set(values)) == len(values)
    occupied = set()
    for panel in DASHBOARD["panels"]:
        position = panel["gridPos"]
        assert position["x"] + position["w"] <= 24
        cells = {
            (x, y)
            for x in range(position["x"], position["x"] + position["w"])
            for y in range(position["y"], position["y"] + position["h"])
        }
        assert not cells & occupied, panel["title"]
        occupied |= cells
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_grafana_is_configured_with_the_dashboard_and_its_data():
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "vitrine.yml").read_text())["providers"]
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == scraped
    assert provider["type"] == "file"
    assert provider["options"]["path"]
