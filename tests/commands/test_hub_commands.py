"""`vitrine pull` and `push` as processes, with the hub's own variables, in the service's environment."""

import os
import subprocess
import sys

import pytest

from common import ROOT
from fake_hub import running_hub
from vitrine.models.bundle.bundle import open_bundle


@pytest.fixture
def run(tmp_path):
    """run(*arguments, **environment) -> (exit status, output) of the command."""
    python = os.environ.get("VITRINE_LIGHT_PYTHON", sys.executable)
    # Whatever the machine's own variables say (some CI machines set HF_HUB_OFFLINE): the tests' hub is asked.
    own = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    own |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", "COLUMNS": "200"}

    def run(*arguments, **environment):
        command = [python, "-m", "vitrine", *map(str, arguments)]
        variables = os.environ | {"PYTHONPATH": str(ROOT)} | own | environment
        done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_bundle_goes_to_a_hub_and_comes_back_also_without_a_network(run, tmp_path, bundle):
    with running_hub() as hub:
        code, output = run("push", bundle.path, "--out", "repository", "--to", "hf-hub:org/tiny", HF_ENDPOINT=hub.url)
        assert code == 0, output
        address = f"hf-hub:org/tiny@{hub.branches['org/tiny']['main']}"
        assert f"vitrine pull hf-hub:org/tiny --out bundles/pulled --digest {bundle.digest}" in output
        code, output = run("pull", address, "--out", "pulled", HF_ENDPOINT=hub.url)
        assert code == 0, output
        assert f"--digest {bundle.digest}" in output
        wrong = "sha256:" + "0" * 64
        code, output = run("pull", address, "--out", "other", "--digest", wrong, HF_ENDPOINT=hub.url)
        assert (code, output.startswith(f"error: {address} is not the requested bundle")) == (1, True), output
    assert open_bundle(tmp_path / "pulled").digest == open_bundle(tmp_path / "repository").digest == bundle.digest
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    code, output = run("pull", address, "--out", "again", "--digest", bundle.digest, **offline)
    assert code == 0, output
    code, output = run("pull", "hf-hub:org/other", "--out", "other", **offline)
    assert (code, "HF_HUB_OFFLINE" in output) == (1, True), output
    assert not (tmp_path / "other").exists()


def test_push_asks_where_to(run, bundle):
    code, output = run("push", bundle.path)
    assert (code, "--out" in output, "--to" in output) == (2, True, True)
