"""Every command works in somebody else's project, sends nothing to anybody, and writes into its own folders alone.

Theirs has packages and a module of our names, PYTHONPATH names it, it is the working directory, and nothing can be
written there. The home is empty, and stays so.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

from common import free_port
from strace import Trace
from vitrine import telemetry
from vitrine.service.processes import workers

THEIRS = ("models/__init__.py", "service/__init__.py", "training/__init__.py", "vitrine.py")
LIGHT = os.environ.get("VITRINE_LIGHT_PYTHON", sys.executable)
# Root may write everywhere: without these two capabilities it is bound by permissions as everybody is.
BOUND = () if os.geteuid() else ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
SECONDS = 240  # a bound, not an expectation


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Somebody else's project, read-only."""
    root = tmp_path_factory.mktemp("theirs") / "project"
    for name in THEIRS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('raise RuntimeError("imported somebody else\'s module")\n')
    (root / "photos").mkdir()
    for number in range(2):
        Image.linear_gradient("L").rotate(90 * number).convert("RGB").save(root / "photos" / f"{number}.png")
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield root
    for folder in folders:
        folder.chmod(0o755)


def environment(project, **more):
    left_out = ("VITRINE_", "PYTHON", "PROMETHEUS_", "MPLCONFIGDIR", *telemetry.OFF)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    own = {"PYTHONPATH": project, "PYTHONDONTWRITEBYTECODE": 1, "OMP_NUM_THREADS": 1}
    return kept | {name: str(value) for name, value in (own | more).items()}


@pytest.fixture
def watched(project, tmp_path):
    """watched(folders...) is a context: (trace, environment) of a command that may write to these folders alone."""

    @contextmanager
    def watch(*folders, **variables):
        place = Path(tempfile.mkdtemp(dir=tmp_path))
        home, trace = place / "home", Trace(place / "trace")
        home.mkdir()
        with tempfile.TemporaryDirectory() as scratch:  # a short path: Ray puts sockets there
            yield trace, environment(project, HOME=home, TMPDIR=scratch, **variables)
            assert not trace.outbound()
            assert not trace.written(scratch, *folders)
            assert not list(home.rglob("*"))

    return watch


def succeed(trace, variables, project, *command):
    """What a watched command prints; it must succeed."""
    finished = subprocess.run(
        trace.command(*BOUND, *command), cwd=project, env=variables, capture_output=True, text=True, timeout=SECONDS
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture
def run(project, watched, tmp_path):
    """run(*arguments, python=..., folders=()) -> what the installed command printed in their project. It must succeed,
    send nothing, and write to `folders` alone."""

    def start(*arguments, python=LIGHT, folders=(), **variables):
        with watched(*folders, **variables) as (trace, inherited):
            return succeed(trace, inherited, project, Path(python).with_name("vitrine"), *arguments)

    return start


def test_the_project_is_in_the_way(project):
    """The other tests would pass for nothing if its modules were not found, or if it could be written."""
    done = subprocess.run(
        [*BOUND, sys.executable, "-c", "import vitrine"], cwd=project, env=environment(project), capture_output=True
    )
    assert b"imported somebody else's module" in done.stderr
    done = subprocess.run([*BOUND, "touch", "file"], cwd=project, capture_output=True)
    assert b"Permission denied" in done.stderr


@pytest.mark.parametrize("words", [["doctor"], ["attribute", "photos/0.png"], ["replay", "photos"], ["recipes"]])
def test_commands_without_output(run, words, bundle_path):
    python = sys.executable if words == ["recipes"] else LIGHT
    assert run(*words, python=python, VITRINE_BUNDLE=bundle_path)


def test_an_account_to_take_along(run, carded, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    files = ["--html", out / "account.html", "--graph", out / "account.json"]
    run("attribute", "photos/0.png", *files, folders=[out], VITRINE_BUNDLE=carded.path)
    assert (out / "account.html").stat().st_size > 10_000


def test_verify(run, bundle_path):
    assert "the graphs run" in run("verify", bundle_path)


@pytest.mark.parametrize("ray", [0, 2])
def test_bulk(run, tmp_path, bundle_path, ray):
    """With Ray, whose workers have import paths of their own. A relative path is from where the command runs."""
    if ray:
        pytest.importorskip("ray")
    out, options = tmp_path / "out", ["--bundle", bundle_path, "--ray", ray, "--part-size", 1]
    assert "2 rows and 0 errors" in run("bulk", "photos", "--out", out, *options, python=sys.executable, folders=[out])


def test_from_a_recipe_to_cards(run, tmp_path, recipe_path, data_root):
    """Training starts a process more by itself, and each starts one that decodes images."""
    recipe, out = tmp_path / "short.toml", tmp_path / "out"
    out.mkdir()
    short = recipe_path.read_text().replace("epochs = 4", "epochs = 1").replace("workers = 0", "workers = 1")
    recipe.write_text(f"{short}\n[bundle]\nvariants = []\nsources = false\n")  # which take time, and write nothing else
    more = {"python": sys.executable, "folders": [out]}
    data, runs, bundle = ["--data-root", data_root], out / "runs", out / "bundle"
    options = ["--devices", 2, "--accelerator", "cpu"]
    run("train", "--recipe", recipe, "--out", runs, *data, *options, **more)
    run("evaluate", "--checkpoint", runs, *data, "--images", 6, **more)
    run("export", "--checkpoint", runs, "--out", bundle, *data, **more)
    few = ["--images", 6, "--held-out", 4, "--references", 2]
    run("cards", "--checkpoint", runs, "--bundle", bundle, "--out", out / "cards", *data, *few, **more)
    assert "the graphs run" in run("verify", out / "cards")


SPAWN = """
import multiprocessing, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    command = sys.argv.pop(1)
    sys.argv[0] = command
    runpy.run_path(command, run_name="__main__")
"""


@pytest.mark.parametrize("how", ["spawn", "torchrun"])
def test_train_in_processes_started_otherwise(project, watched, tmp_path, recipe_path, data_root, how):
    """By `spawn` instead of `fork` (the decoding workers), and by torchrun (the training processes)."""
    recipe, script = tmp_path / "short.toml", tmp_path / "spawn.py"
    recipe.write_text(recipe_path.read_text().replace("workers = 0", "workers = 1"))
    script.write_text(SPAWN)
    vitrine = Path(sys.executable).with_name("vitrine")
    starts = {
        "spawn": [sys.executable, script, vitrine],
        "torchrun": [vitrine.with_name("torchrun"), "--standalone", "--nproc-per-node", 2, "--no-python", vitrine],
    }
    options = ["--data-root", data_root, "--accelerator", "cpu", "--max-steps", 2, "--out", tmp_path / "run"]
    with watched(tmp_path / "run") as (trace, variables):
        succeed(trace, variables, project, *starts[how], "train", "--recipe", recipe, *options)
    assert (tmp_path / "run" / "log.jsonl").read_text().count("\n") == 2


def test_serve_a_worker_that_is_replaced_and_a_reload(project, watched, tmp_path, bundle_path):
    port, log, home = free_port(), tmp_path / "log", tmp_path / "home"
    relative = os.path.relpath(bundle_path, project)
    command = (*BOUND, Path(LIGHT).with_name("vitrine"), "serve", "--port", port)
    with (
        watched(home, BENTOML_HOME=home, VITRINE_BUNDLE=relative) as (trace, variables),
        log.open("w") as output,
        subprocess.Popen(trace.command(*command), cwd=project, env=variables, stdout=output, stderr=output) as root,
    ):
        wait_until_ready(root, port, log)
        process = supervisor(root)
        try:
            (first,) = workers.worker_processes(process.pid)
            first.kill()
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and first.pid in {worker.pid for worker in serving(process)}:
                time.sleep(0.1)
            wait_until_ready(root, port, log)
            (second,) = serving(process)
            assert second.pid != first.pid
            process.send_signal(signal.SIGHUP)
            wait_until_ready(root, port, log)
            for path in ("/", "/metrics", "/docs"):
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10).close()
        finally:
            process.send_signal(signal.SIGTERM)
            assert root.wait(40) == 0, log.read_text()
    assert "somebody else" not in log.read_text()


def supervisor(root):
    """The process of `vitrine serve`, which is strace's child where it is watched."""
    inner = psutil.Process(root.pid)
    return inner.children()[0] if inner.name() == "strace" else inner


def serving(process):
    return [worker for worker in workers.worker_processes(process.pid) if worker.status() != psutil.STATUS_ZOMBIE]


def wait_until_ready(process, port, log):
    """And until it has answered."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError, urllib.error.URLError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/model", timeout=10) as answer:
                assert json.load(answer)["name"] == "tiny"
            return
        time.sleep(0.1)
    pytest.fail(f"the server did not become ready; its log:\n{log.read_text()}")
