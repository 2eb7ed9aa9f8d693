"""Every command works in somebody else's project.

Theirs has packages and a module of our names, PYTHONPATH names it, it is the working directory, and nothing can be
written there.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

from common import free_port
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
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VITRINE_", "PYTHON"))}
    kept.pop("PROMETHEUS_MULTIPROC_DIR", None)
    return kept | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"} | {name: str(v) for name, v in more.items()}


@pytest.fixture
def run(project):
    """run(*arguments, python=...) -> what the installed command printed in their project; it must succeed."""

    def start(*arguments, python=LIGHT, **variables):
        command = [*BOUND, Path(python).with_name("vitrine"), *arguments]
        finished = subprocess.run(
            [str(word) for word in command],
            cwd=project,
            env=environment(project, **variables),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

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


def test_verify(run, bundle_path):
    assert "the graphs run" in run("verify", bundle_path)


@pytest.mark.parametrize("ray", [0, 2])
def test_bulk(run, tmp_path, bundle_path, ray):
    """With Ray, whose workers have import paths of their own. A relative path is from where the command runs."""
    if ray:
        pytest.importorskip("ray")
    options = ["--bundle", bundle_path, "--ray", ray, "--part-size", 1]
    assert "2 rows and 0 errors" in run("bulk", "photos", "--out", tmp_path / "out", *options, python=sys.executable)


def test_from_a_recipe_to_cards(run, tmp_path, recipe_path, data_root):
    """Training starts a process more by itself, and each starts one that decodes images."""
    recipe, runs, bundle = tmp_path / "short.toml", tmp_path / "runs", tmp_path / "bundle"
    recipe.write_text(recipe_path.read_text().replace("epochs = 4", "epochs = 1").replace("workers = 0", "workers = 1"))
    data = ["--data-root", data_root]
    options = ["--devices", 2, "--accelerator", "cpu"]
    run("train", "--recipe", recipe, "--out", runs, *data, *options, python=sys.executable)
    run("evaluate", "--checkpoint", runs, *data, "--images", 6, python=sys.executable)
    run("export", "--checkpoint", runs, "--out", bundle, *data, python=sys.executable)
    few = ["--images", 6, "--held-out", 4, "--references", 2]
    cards = ["--checkpoint", runs, "--bundle", bundle, "--out", tmp_path / "cards"]
    run("cards", *cards, *data, *few, python=sys.executable)
    assert "the graphs run" in run("verify", tmp_path / "cards")


SPAWN = """
import multiprocessing, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    command = sys.argv.pop(1)
    sys.argv[0] = command
    runpy.run_path(command, run_name="__main__")
"""


@pytest.mark.parametrize("how", ["spawn", "torchrun"])
def test_train_in_processes_started_otherwise(project, tmp_path, recipe_path, data_root, how):
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
    finished = subprocess.run(
        [str(word) for word in (*BOUND, *starts[how], "train", "--recipe", recipe, *options)],
        cwd=project,
        env=environment(project),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (tmp_path / "run" / "log.jsonl").read_text().count("\n") == 2


def test_serve_and_a_worker_that_is_replaced(project, tmp_path, bundle_path):
    port, log = free_port(), tmp_path / "log"
    relative = os.path.relpath(bundle_path, project)
    variables = environment(project, BENTOML_HOME=tmp_path / "home", VITRINE_BUNDLE=relative)
    command = [*BOUND, str(Path(LIGHT).with_name("vitrine")), "serve", "--port", str(port)]
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=project, env=variables, stdout=output, stderr=output) as process,
    ):
        try:
            wait_until_ready(process, port, log)
            (first,) = workers.worker_processes(process.pid)
            first.kill()
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and first.pid in {worker.pid for worker in serving(process)}:
                time.sleep(0.1)
            wait_until_ready(process, port, log)
            (second,) = serving(process)
            assert second.pid != first.pid
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0, log.read_text()
    assert "somebody else" not in log.read_text()


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
