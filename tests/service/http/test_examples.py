"""The clients in service/examples, run against a real server that requires a key."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from common import ROOT

EXAMPLES = ROOT / "service" / "examples"
LABELS = ["cat", "dog", "truck"]


@pytest.fixture(scope="module")
def guarded(start_server, bundle_path):
    with start_server(VITRINE_BUNDLE=bundle_path, VITRINE_API_KEYS="the-key") as server:
        yield server


@pytest.fixture
def photo(picture, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(picture("JPEG"))
    return path


@pytest.fixture
def expected(guarded, photo):
    """The predictions, as the server answers them."""
    answer = guarded.post(
        "/v1/attribute", photo.read_bytes(), {"labels": LABELS}, Authorization="Bearer the-key"
    ).json()
    return [(prediction["label"], prediction["probability"]) for prediction in answer["predictions"]]


def example(name, guarded, photo, key="the-key"):
    """(exit status, standard output, standard error) of an example."""
    url, environment = f"http://127.0.0.1:{guarded.port}", dict(os.environ)
    if name == "attribute.sh":
        command = ["sh", EXAMPLES / name, photo, json.dumps({"labels": LABELS}), url, key]
    elif name == "attribute.mjs":
        if shutil.which("node") is None:
            pytest.skip("node is not installed")
        command = ["node", EXAMPLES / name, photo, *LABELS]
        environment |= {"URL": url, "KEY": key}
    else:
        command = [sys.executable, EXAMPLES / name, photo, *LABELS, "--url", url, "--key", key]
    finished = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120)
    return finished.returncode, finished.stdout, finished.stderr


NAMES = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".sh", ".py", ".mjs"))


def test_there_is_one_for_each_language():
    assert NAMES == ["attribute.mjs", "attribute.sh", "attribute_bentoml.py", "attribute_httpx.py"]


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_shown(name, guarded, photo, expected):
    status, output, error = example(name, guarded, photo)
    assert (status, error) == (0, "")
    if name == "attribute.sh":
        predictions = [(p["label"], p["probability"]) for p in json.loads(output)["predictions"]]
        assert [label for label, _ in predictions] == [label for label, _ in expected]
        return
    lines = [line.split() for line in output.splitlines()[: len(LABELS)]]
    assert [label for _, label in lines] == [label for label, _ in expected]
    assert [float(share.rstrip("%")) for share, _ in lines] == pytest.approx([100 * p for _, p in expected], abs=0.06)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mistake", ["no image", "wrong key"])
def test_a_refusal_is_shown_and_is_no_success(name, guarded, photo, mistake):
    if mistake == "no image":
        photo.write_bytes(b"no image")
    status, output, error = example(name, guarded, photo, key="wrong" if mistake == "wrong key" else "the-key")
    assert status != 0
    assert ("unsupported_image" if mistake == "no image" else "unauthorized") in output + error
    assert "Traceback" not in error
