"""`vitrine serve` under load: a worker that is killed, SIGTERM, new bundles."""

import json
import os
import shutil
import signal
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.bundle.manifest import Manifest
from vitrine.models.bundle.sealing import seal

WITHIN_SECONDS = 10  # a killed worker is replaced within this time


@pytest.fixture(scope="module")
def other_bundle(bundle_path, tmp_path_factory):
    """The same CLIP at half the logit scale: a different digest, and every logit halved."""
    path = shutil.copytree(bundle_path, tmp_path_factory.mktemp("other") / "bundle")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").unlink()
    seal(path, Manifest.model_validate(manifest | {"logit_scale": manifest["logit_scale"] / 2}))
    return path


class Load:
    """Clients that send requests without pause until the load is stopped.

    Records (time, status or error, answer) of each request, and the ids of those that got no answer.
    """

    def __init__(self, server, picture, clients=4, path="/v1/attribute", **headers):
        self.answers, self.unanswered, self._stop = [], [], threading.Event()
        self._url, self._picture, self._headers = f"http://127.0.0.1:{server.port}{path}", picture, headers
        self._threads = [threading.Thread(target=self._send) for _ in range(clients)]

    def _send(self):
        with httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0)) as http:
            while not self._stop.is_set():
                start, request_id = time.monotonic(), uuid.uuid4().hex
                headers = {"X-Request-ID": request_id, **self._headers}
                try:
                    response = http.post(self._url, files={"image": self._picture}, headers=headers)
                    self.answers.append((start, response.status_code, response.json()))
                except httpx.TransportError as error:
                    self.answers.append((start, type(error).__name__, None))
                    self.unanswered.append(request_id)
                    if self._stop.wait(0.05):
                        return

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        self.wait_for(8)
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more):
        """Wait until `more` further requests have been answered with 200."""
        target, end = self.count(200) + more, time.monotonic() + 30
        while self.count(200) < target:
            assert time.monotonic() < end, Counter(status for _, status, _ in self.answers)
            time.sleep(0.01)

    def count(self, status):
        return sum(actual == status for _, actual, _ in list(self.answers))

    def statuses(self):
        return {status for _, status, _ in self.answers}


@pytest.fixture
def link(bundle_path, tmp_path):
    """A symbolic link to the bundle: it is what is served, and can be pointed elsewhere."""
    path = tmp_path / "serve-this"
    path.symlink_to(bundle_path)
    return path


def point(link, target):
    """Replace the link atomically, as deployments do: it exists at every moment."""
    new = link.with_suffix(".new")
    new.symlink_to(target)
    os.replace(new, link)


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "admin-keys"
    path.write_text("# of the deployment\nlet me in\n")
    return path


def reload_by_key(server, key="let me in"):
    return server.http.post("/admin/reload", headers={"Authorization": f"Bearer {key}"})


@pytest.mark.parametrize("how", ["SIGHUP", "/admin/reload"])
def test_a_new_bundle_is_loaded_under_load(start_server, bundle, other_bundle, link, keys, picture, how):
    digests = {bundle.digest, open_bundle(other_bundle).digest}
    with start_server(VITRINE_BUNDLE=link, VITRINE_ADMIN_KEYS_FILE=keys) as server, Load(server, picture()) as load:
        (worker,) = server.workers
        point(link, other_bundle)
        if how == "SIGHUP":
            server.process.send_signal(signal.SIGHUP)
        else:
            answer = reload_by_key(server)
            assert answer.status_code == 200, answer.text
            assert {answer.json()[which]["digest"] for which in ("model", "previous")} == digests
        end = time.monotonic() + 30
        while load.answers[-1][2]["model"]["digest"] == bundle.digest:
            assert time.monotonic() < end
            time.sleep(0.05)
        load.wait_for(8)
        assert [process.pid for process in server.workers] == [worker.pid]
        metrics = server.http.get("/metrics").text
    assert load.statuses() == {200}
    logits = {
        digest: {
            answer["predictions"][0]["logit"] for _, _, answer in load.answers if answer["model"]["digest"] == digest
        }
        for digest in digests
    }
    (old,), (new,) = logits[bundle.digest], logits[(digests - {bundle.digest}).pop()]
    assert new == pytest.approx(old / 2, abs=1e-4)
    assert f'digest="{bundle.digest}",name="tiny",provider="CPUExecutionProvider"}} 0.0' in metrics
    assert 'vitrine_reloads_total{outcome="taken"} 1.0' in metrics


def test_a_broken_bundle_is_refused_and_the_old_one_stays(
    start_server, bundle, other_bundle, link, keys, picture, tmp_path
):
    broken = shutil.copytree(other_bundle, tmp_path / "broken")
    (broken / "fold.npy").write_bytes(b"?")
    with start_server(VITRINE_BUNDLE=link, VITRINE_ADMIN_KEYS_FILE=keys) as server, Load(server, picture()) as load:
        point(link, broken)
        refused = reload_by_key(server)
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "bundle_refused"
        assert "fold.npy" in refused.json()["error"]["message"]
        server.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 30
        while 'vitrine_reloads_total{outcome="refused"} 2.0' not in server.http.get("/metrics").text:
            assert time.monotonic() < end
            time.sleep(0.1)
        load.wait_for(4)
        assert server.http.get("/readyz").status_code == 200
        assert server.log.read_text().count("reload refused") == 2
    assert load.statuses() == {200}
    assert {answer["model"]["digest"] for _, _, answer in load.answers} == {bundle.digest}


def test_only_the_requests_of_a_killed_worker_fail_and_another_takes_its_place(start_server, bundle_path, picture):
    clients = 4
    with start_server(VITRINE_BUNDLE=bundle_path) as server, Load(server, picture(), clients) as load:
        (worker,) = server.workers
        worker.kill()
        killed = time.monotonic()
        load.wait_for(8)
        recovered = next(start for start, status, _ in load.answers if status == 200 and start > killed)
        assert [process.pid for process in server.workers] != [worker.pid]
    assert recovered - killed < WITHIN_SECONDS
    failed = [status for _, status, _ in load.answers if status != 200]
    assert len(failed) <= clients, failed  # each had one in flight


def test_sigterm_answers_what_was_admitted(start_server, bundle_path, picture):
    """Three requests that wait for a fuller batch when the signal comes."""
    with (
        start_server(VITRINE_BUNDLE=bundle_path, VITRINE_BATCH_WAIT_MS=2000) as server,
        ThreadPoolExecutor() as clients,
    ):
        waiting = [clients.submit(server.post, "/v1/attribute", picture()) for _ in range(3)]
        end = time.monotonic() + 30
        while "vitrine_queue_images 3.0" not in server.http.get("/metrics").text:
            assert time.monotonic() < end
        server.process.send_signal(signal.SIGTERM)
        assert [response.result().status_code for response in waiting] == [200] * 3
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log.read_text()


def test_sigterm_under_load_loses_no_request_that_was_read(start_server, bundle_path, picture):
    with start_server(VITRINE_BUNDLE=bundle_path) as server, Load(server, picture(), 8) as load:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        log = server.log.read_text()  # one line per request that was read, whatever its outcome
    # A connection whose request was never read is refused, reset or closed: it was never admitted.
    assert load.statuses() <= {200, "ConnectError", "ReadError", "RemoteProtocolError"}
    assert load.unanswered, "the load went on after the end"
    assert not [request_id for request_id in load.unanswered if request_id in log]
    assert log.count('"status": 200') >= load.count(200)


def test_several_workers_share_the_port_and_a_reload(start_server, bundle, other_bundle, link, keys, picture):
    environment = {"VITRINE_BUNDLE": link, "VITRINE_ADMIN_KEYS_FILE": keys, "VITRINE_WORKERS": 2}
    with start_server(**environment) as server:
        assert len(server.workers) == 2
        point(link, other_bundle)
        assert reload_by_key(server).status_code == 200
        new, end = open_bundle(other_bundle).digest, time.monotonic() + 30
        while {server.attribute(picture())["model"]["digest"] for _ in range(16)} != {new}:
            assert time.monotonic() < end


def test_workers_end_with_a_parent_that_was_killed(start_server, bundle_path):
    """Otherwise they would keep the port, with no process to supervise them."""
    with start_server(VITRINE_BUNDLE=bundle_path, VITRINE_WORKERS=2) as server:
        orphans = server.workers
        assert len(orphans) == 2
        server.process.kill()
        _, alive = psutil.wait_procs(orphans, timeout=30)
        assert not alive


def test_a_port_in_use_is_reported_in_one_line(server, run_python, bundle_path):
    finished = run_python("-m", "vitrine", "serve", "--port", server.port, VITRINE_BUNDLE=bundle_path)
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"error: cannot listen on 127.0.0.1:{server.port}: Address already in use")
    assert "Traceback" not in finished.stderr + finished.stdout
