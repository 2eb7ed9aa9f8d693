"""What `vitrine serve` does when BentoML's server cannot start; test_lifecycle.py has the rest."""

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
    """start(*failures) -> how often BentoML was started, when its arbiters fail with these in turn and then end."""

    def play(*failures):
        remaining, closed = list(failures), []

        def serve(*_, **__):
            failure = remaining.pop(0) if remaining else None

            def run():
                if failure:
                    raise failure

            thread = threading.Thread(target=run)
            thread.start()
            sockets = SimpleNamespace(close_all=lambda: closed.append(True))
            arbiter = SimpleNamespace(running=False, _thread=thread, sockets=sockets, iter_watchers=list)
            return SimpleNamespace(arbiter=arbiter)

        monkeypatch.setattr(supervisor, "bentoml", SimpleNamespace(serve=serve))
        monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(supervisor.metrics_folder, "use_own_folder", lambda: None)  # under the tester's home
        supervisor.serve("127.0.0.1", 0)
        return len(closed)

    hook, on_hangup = threading.excepthook, signal.getsignal(signal.SIGHUP)
    yield play
    threading.excepthook = hook
    signal.signal(signal.SIGHUP, on_hangup)


def port_in_use():
    return ZMQError(errno.EADDRINUSE)


def test_a_port_that_was_taken_meanwhile_is_tried_again(start):
    assert start(port_in_use(), port_in_use()) == 2


@pytest.mark.parametrize("failure", [ValueError("no service"), ZMQError(errno.EACCES)])
def test_any_other_failure_is_reported_at_once(start, failure):
    with pytest.raises(supervisor.ServeError, match=str(failure)):
        start(failure)


def test_retries_are_limited(start):
    with pytest.raises(supervisor.ServeError, match="Address already in use"):
        start(*[port_in_use() for _ in range(100)])


def test_its_environment_is_left_as_it_was(start):
    """The variable that names the workers' parent would end the workers of a later server."""
    start()
    with pytest.raises(supervisor.ServeError):
        start(ValueError("no service"))
    assert workers.PARENT_PID_VARIABLE not in os.environ
