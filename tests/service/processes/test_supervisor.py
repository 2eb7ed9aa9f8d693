"""What `vitrine serve` does when BentoML's server cannot start; test_lifecycle.py has the rest."""

import errno
import os
import signal
import threading
from types import SimpleNamespace

import pytest
from circus.exc import ConflictError
from zmq import ZMQError

from vitrine.service.processes import reports, supervisor, workers


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
            arbiter = SimpleNamespace(
                running=False, _thread=thread, sockets=sockets, iter_watchers=list, _stopping=False
            )
            return SimpleNamespace(arbiter=arbiter)

        monkeypatch.setattr(supervisor, "bentoml", SimpleNamespace(serve=serve))
        monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(supervisor.metrics_folder, "use_own_folder", lambda: None)  # under the tester's home
        supervisor.serve("127.0.0.1", 0)
        return len(closed)

    hook = threading.excepthook
    yield play
    threading.excepthook = hook


@pytest.fixture(autouse=True)
def handlers():
    """The signal handlers of this process are those of before, afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
    assert not {workers.PARENT_PID_VARIABLE, reports.SOCKET_VARIABLE, *supervisor.ALLOCATOR} & set(os.environ)


class FakeArbiter:
    """An arbiter with a watcher; `events` are called one after the other, each before the supervisor looks."""

    def __init__(self, monkeypatch, reading, events):
        self.running, self._stopping, self.loop = True, False, self
        self.watcher, self.managed, self._events = SimpleNamespace(processes=[]), 0, iter(events)
        self._reading, self._thread = reading, self
        monkeypatch.setattr(supervisor, "_dead_workers", lambda _: self.dead)
        monkeypatch.setattr(supervisor, "POLL_SECONDS", 0)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_stopping", True))
        self.dead = set()

    def is_alive(self):
        event = next(self._events, None)
        if event:
            event()
        return event is not None

    def iter_watchers(self):
        return [self.watcher]

    def read(self):
        reports, self._reading[:] = list(self._reading), []
        return reports

    def add_callback(self, function, *arguments):
        function(*arguments)

    def manage_watchers(self):
        self.managed += 1


@pytest.fixture
def supervise(monkeypatch):
    """supervise(*events) -> (arbiter, problem). An event: a set of dead workers, a report, or something to call.

    before: BentoML's handler of SIGTERM instead of one that obeys."""

    def play(*events, before=None):
        reading = []

        def happen(event):
            if isinstance(event, reports.Report):
                reading.append(event)
            elif isinstance(event, set):
                arbiter.dead = event
            else:
                event()

        arbiter = FakeArbiter(monkeypatch, reading, [lambda event=event: happen(event) for event in events])
        if before:
            signal.signal(signal.SIGTERM, before)
        problem = supervisor._Supervision(arbiter, arbiter, 25).run()
        return arbiter, problem

    return play


def test_a_dead_worker_is_replaced_at_once(supervise):
    arbiter, problem = supervise(reports.Report(1, None), {1}, set())
    assert (arbiter.managed, problem) == (1, None)


def test_workers_that_die_one_after_the_other_before_they_are_ready_are_replaced_with_pauses(supervise, capsys):
    """BentoML's own check comes every ten seconds; without a pause they would take a processor for themselves."""
    arbiter, problem = supervise(*({number} for number in range(1, 10)))
    assert (arbiter.managed, problem) == (2, None)
    assert "3 workers in a row died before they were ready" in capsys.readouterr().err


def test_a_worker_that_became_ready_ends_the_row(supervise):
    arbiter, _ = supervise({1}, {2}, set(), reports.Report(3, None), {3}, {4}, {5})
    assert arbiter.managed == 5


def test_a_worker_that_cannot_start_ends_the_server(supervise):
    arbiter, problem = supervise(reports.Report(1, "fold.npy is broken"), {1}, set())
    assert (arbiter._stopping, arbiter.managed, problem) == (True, 0, "fold.npy is broken")


def test_a_worker_that_cannot_start_beside_one_that_works_is_tried_again(supervise, capsys):
    ready = reports.Report(os.getpid(), None)  # a process that lives
    arbiter, problem = supervise(ready, reports.Report(1, "fold.npy is broken"), {1}, set())
    assert (arbiter._stopping, arbiter.managed, problem) == (False, 1, None)
    assert "fold.npy is broken" in capsys.readouterr().err


def test_a_worker_that_ends_while_the_server_stops_is_not_replaced(supervise):
    """BentoML would log a traceback: it is stopping, and cannot start one."""
    arbiter, _ = supervise(lambda: signal.raise_signal(signal.SIGTERM), {1}, {1})
    assert (arbiter._stopping, arbiter.managed) == (True, 0)


def test_a_conflict_within_bentoml_is_no_traceback():
    def conflict():
        raise ConflictError("arbiter is already running arbiter_stop command")

    supervisor._manage(SimpleNamespace(manage_watchers=conflict))


def test_the_signal_to_stop_is_repeated_until_bentoml_takes_it(supervise):
    """It drops the signal while it starts a worker."""
    asked = []

    def deaf(*_):
        asked.append(signal.SIGTERM)

    nothing = lambda: None  # noqa: E731
    arbiter, _ = supervise(lambda: signal.raise_signal(signal.SIGTERM), nothing, nothing, before=deaf)
    assert not arbiter._stopping
    assert len(asked) == 3
