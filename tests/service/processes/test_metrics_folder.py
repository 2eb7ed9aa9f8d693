"""Each server has a folder for its metrics: no other server empties it, and none is left behind by the dead."""

import os
import signal
import subprocess
import sys

import pytest

from vitrine.service.processes import metrics_folder

CLAIM = """
import sys
from vitrine.service.processes import metrics_folder
print(metrics_folder._claim(sys.argv[1]), flush=True)
input()
"""


def requests_in(server):
    lines = server.http.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith('vitrine_requests_total{endpoint="/v1/attribute"')]


def test_two_servers_under_one_home(server, start_server, bundle_path, picture):
    """`bentoml serve`, and `vitrine serve` beside it."""
    home = server.log.parent
    server.attribute(picture())
    before = requests_in(server)
    assert before
    with start_server(VITRINE_BUNDLE=bundle_path, BENTOML_HOME=home) as other:
        assert requests_in(other) == []
        assert requests_in(server) == before
        assert len(list((home / "vitrine-metrics").iterdir())) == 2
    assert len(list((home / "vitrine-metrics").iterdir())) == 1
    assert requests_in(server) == before


@pytest.fixture
def claim(tmp_path):
    """claim() -> (process, its folder under one home)."""
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_folders_of_the_dead_are_removed_and_no_others(claim):
    killed, left_behind = claim()
    living, kept = claim()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert os.path.isdir(left_behind)
    _, new = claim()
    assert not os.path.exists(left_behind)
    assert os.path.isdir(kept)
    assert os.path.isdir(new)
    living.communicate("\n")  # ends in peace, and removes its own
    assert not os.path.exists(kept)


def test_a_workers_folder_outlives_its_parent(claim):
    """Of `bentoml serve`, whose workers go on when their parent is killed."""
    parent, folder = claim()
    metrics_folder.hold(folder)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    claim()
    assert os.path.isdir(folder)
    os.close(metrics_folder._held.pop())
    claim()
    assert not os.path.exists(folder)


def test_without_room_under_the_home_it_is_a_temporary_one(tmp_path):
    (tmp_path / "file").write_text("")
    folder = metrics_folder._claim(str(tmp_path / "file"))
    assert os.path.isdir(folder)
    os.rmdir(folder)
