"""Every request of the documents is sent as it is shown, to a real server on the embedded bundle; answers that are
shown are what comes back."""

import json
import re
import shutil
import subprocess

import pytest

from common import ROOT
from documents import differences, fences, part_of, shown_answer

URL = "http://127.0.0.1:3000"
DEMO, PHOTO = ROOT / "models" / "demo", ROOT / "build" / "cat.png"  # the photo is the Makefile's
SENT = [fence for fence in fences("sh", "") if "curl" in fence.text]
PYTHON = fences("python")


@pytest.fixture(scope="module")
def demo(start_server):
    with start_server(VITRINE_PRECISION="fp32") as server:
        yield server


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory that the documents have: a checkout after `make serve`, with a photo and a bundle."""
    if not PHOTO.exists():
        pytest.skip("make build/cat.png")
    for name in ("build", "bundles"):
        (tmp_path / name).mkdir()
    for copy in ("build/cat.png", "photo.jpg"):  # a file is known by its content, not by its name
        shutil.copy(PHOTO, tmp_path / copy)
    for name in ("b32", "mine"):
        (tmp_path / "bundles" / name).symlink_to(DEMO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITRINE_PRECISION", "fp32")
    return tmp_path


def test_there_are_requests():
    assert len(SENT) >= 9
    assert len(PYTHON) >= 5


@pytest.mark.parametrize("fence", SENT, ids=lambda fence: fence.name)
def test_requests_are_answered_as_shown(demo, folder, fence):
    answer = None
    for command in fence.commands:
        if not re.match("curl|printf", command):  # others are `tests/commands/test_documented_commands.py`'s
            continue
        here = command.replace("curl ", "curl -sS --fail-with-body ").replace(URL, f"http://127.0.0.1:{demo.port}")
        finished = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=60)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        answer = json.loads(finished.stdout) if command.startswith("curl") else answer
    if fence.output:
        shown = shown_answer(fence.output)
        part = answer if fence.output.startswith("{") else part_of(answer, next(iter(shown)))
        assert not differences(shown, part)


@pytest.mark.parametrize("fence", PYTHON, ids=lambda fence: fence.name)
def test_python_runs_as_shown(demo, folder, fence):
    text = re.sub(r"(?:http://)?127\.0\.0\.1:3000", lambda m: m[0].replace("3000", str(demo.port)), fence.text)
    exec(compile(text, fence.name, "exec"), {"paths": ["photo.jpg"] * 2, "image": "photo.jpg"})
