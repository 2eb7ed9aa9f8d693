"""Homes that cannot be written, or are not there: the server works without, or ends with one sentence."""

import os
import tempfile
from pathlib import Path

import pytest

from vitrine.service.processes.home import HomeError, bentoml_home

UNWRITABLE = "/proc/self"  # for root, too


@pytest.fixture(autouse=True)
def no_home(monkeypatch):
    monkeypatch.delenv("BENTOML_HOME", raising=False)


@pytest.mark.parametrize("home", [UNWRITABLE, "/dev/null", "relative", None])
def test_a_home_that_cannot_be_written_is_replaced_by_a_temporary_one(monkeypatch, home):
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # a user without a name
    else:
        monkeypatch.setenv("HOME", home)
    with bentoml_home():
        place = Path(os.environ["BENTOML_HOME"])
        assert place.is_dir()
    assert not place.exists()
    assert "BENTOML_HOME" not in os.environ


def test_a_home_that_can_be_written_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with bentoml_home():
        assert "BENTOML_HOME" not in os.environ


def test_a_chosen_home_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENTOML_HOME", "here")
    with bentoml_home():
        assert os.environ["BENTOML_HOME"] == str(tmp_path / "here")


def test_no_folder_for_temporary_files(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [UNWRITABLE])
    with pytest.raises(HomeError, match="set TMPDIR to a writable folder"), bentoml_home():
        pass


def test_no_room_while_the_server_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    with pytest.raises(HomeError, match="No space left on device"), bentoml_home():
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"BENTOML_HOME": UNWRITABLE}, "BENTOML_HOME=/proc/self cannot be written"),
        ({"HOME": UNWRITABLE}, "cannot listen on"),
    ],
    ids=["chosen", "of the user"],
)
def test_serve_says_so_in_one_sentence(run_python, bundle_path, variables, message):
    """The second gets past the home, and as far as an address that is not this machine's."""
    command = ("-m", "vitrine", "serve", "--host", "192.0.2.1", "--port", 3000)
    finished = run_python(*command, VITRINE_BUNDLE=bundle_path, **variables)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ")
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr + finished.stdout
