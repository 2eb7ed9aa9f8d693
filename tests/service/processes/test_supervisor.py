"""What `vitrine serve` does when BentoML's server cannot start; tests/service/test_lifecycle.py has the rest."""

import errno
import os
import signal
import threading
from types import SimpleNamespace

import pytest
from zmq import ZMQError

from vitrine.service.processes import supervisor, workers


@pytest.fixture
def start(monkeypatch):
    """start(*failures) -> how often BentoML was started, where its arbiters fail so, one after the other, then end."""

    def play(*failures):
        left, closed = list(failures), []

        def serve(*_, **__):
            failure = left.pop(0) if left else None

            def run():
                if failure:
                    raise failure

            thread = threading.Thread(target=run)
            thread.start()
            sockets = SimpleNamespace(close_all=lambda: closed.append(True))
            arbiter = SimpleNamespace(running=False, _thread=thread, sockets=sockets, iter_watchers=list)
            return SimpleNamespace(arbiter=arbiter)

        monkeypatch.setattr(supervisor, "bentoml", SimpleNamespace(serve=serve))
        monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.01)
        supervisor.serve("127.0.0.1", 0)
        return len(closed)

    hook, on_hangup = threading.excepthook, signal.getsignal(signal.SIGHUP)
    yield play
    threading.excepthook = hook
    signal.signal(signal.SIGHUP, on_hangup)


def taken():
    return ZMQError(errno.EADDRINUSE)


def test_a_port_that_was_taken_meanwhile_is_tried_again(start):
    assert start(taken(), taken()) == 2


@pytest.mark.parametrize("failure", [ValueError("no service"), ZMQError(errno.EACCES)])
def test_any_other_failure_is_told_at_once(start, failure):
    with pytest.raises(supervisor.ServeError, match=str(failure)):
        start(failure)


def test_it_is_not_tried_for_ever(start):
    with pytest.raises(supervisor.ServeError, match="Address already in use"):
        start(*[taken() for _ in range(100)])


def test_its_environment_is_left_as_it_was(start):
    """What tells workers of their parent would end those of another."""
    start()
    with pytest.raises(supervisor.ServeError):
        start(ValueError("no service"))
    assert workers.PARENT not in os.environ
