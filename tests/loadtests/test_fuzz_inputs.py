"""Damaged inputs: a slice of `fuzz_inputs.py`, and that it would notice what it looks for."""

import os
import random
import signal
import time

import pytest

import fuzz_inputs
from fuzz_corpus import mutate
from fuzz_inputs import KINDS, READERS, fuzz, judge, made, prepare


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder, seeds) of `prepare`."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        yield folder, prepare(folder)


def test_a_slice_of_it(tmp_path):
    variables = dict(os.environ)
    result = fuzz(200, seed=20261129, kinds=list(KINDS), keep=tmp_path / "keep", seconds=60, allowed_mib=1024)
    assert result.failures == []
    assert set(result.outcomes) == set(KINDS)
    assert sum(outcomes["read"] for outcomes in result.outcomes.values()) > 40
    assert sum(outcomes["refused"] for outcomes in result.outcomes.values()) > 40
    assert result.images > 200
    assert not (tmp_path / "keep").exists()
    assert dict(os.environ) == variables


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_can_be_made_again(files, kind):
    _, seeds = files
    inputs = [made(1, kind, number, seeds) for number in range(12)]
    assert inputs == [made(1, kind, number, seeds) for number in range(12)]
    assert inputs != [made(2, kind, number, seeds) for number in range(12)]
    assert len(set(inputs)) > 6
    assert mutate(kind, seeds[kind], random.Random(0)) != seeds[kind][0]


def plant(monkeypatch, reader):
    monkeypatch.setitem(READERS, "labels", ("x.json", reader))


def test_what_it_looks_for_is_noticed(files, monkeypatch):
    """A bug, memory, a message that cannot be printed."""
    folder, seeds = files
    good = seeds["labels"][0]
    assert judge("labels", good, folder).outcome == "read"
    assert judge("labels", b"{}", folder).outcome == "refused"
    plant(monkeypatch, lambda file: {}["bug"])
    assert judge("labels", good, folder).outcome == "exception"
    plant(monkeypatch, lambda file: (len(bytearray(b"x") * 300 * 2**20), 0))
    assert judge("labels", good, folder).mib > 200

    def unprintable(file):
        raise fuzz_inputs.VitrineError("\udcff")

    plant(monkeypatch, unprintable)
    assert judge("labels", good, folder).outcome == "the message is not a text"


class Process:
    """In place of the reading process: it dies of the first input, hangs at the second, reads the third."""

    starts = 0

    def __init__(self, target, args, daemon):
        self.connection, self.exitcode = args[0], None
        Process.starts += 1

    def start(self):
        self.child = os.fork()
        if not self.child:
            self.connection.send("ready")
            while (question := self.connection.recv()) is not None:
                number = question[1]
                if number == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                if number == 1:
                    time.sleep(60)
                self.connection.send(fuzz_inputs.Verdict("read", ""))
            os._exit(0)

    def kill(self):
        if self.child:
            os.kill(self.child, signal.SIGKILL)

    def join(self, seconds=None):
        if self.child:
            self.exitcode = -os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
            self.child = 0


def test_crashes_and_hangs_are_kept_and_the_rest_is_read(monkeypatch, tmp_path):
    context = fuzz_inputs.multiprocessing.get_context("fork")
    monkeypatch.setattr(context, "Process", Process, raising=False)
    monkeypatch.setattr(fuzz_inputs.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    result = fuzz(3, seed=0, kinds=["labels"], keep=tmp_path / "keep", seconds=0.2, allowed_mib=1024)
    crash, hang = result.failures
    assert crash.startswith("labels/0: crash: the process ended with")
    assert hang.startswith("labels/1: hang: ")
    assert dict(result.outcomes["labels"]) == {"crash": 1, "hang": 1, "read": 1}
    assert {path.name for path in (tmp_path / "keep").iterdir()} == {
        f"labels-0-{number}{ending}" for number in (0, 1) for ending in ("", ".log")
    }
    assert Process.starts == 3
