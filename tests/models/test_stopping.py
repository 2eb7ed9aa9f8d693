"""SIGTERM and Ctrl-C: the first ends the work in order, a second one ends the process."""

import os
import signal
import threading

import pytest

from vitrine.models.stopping import SIGNALS, Stopped, advising, noted_signals, signals_raise


@pytest.fixture(autouse=True)
def handlers():
    """Whatever a test does, the handlers are as before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    after = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_raises_and_the_next_is_the_systems(number, status):
    with signals_raise():
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(number)
        assert {signal.getsignal(other) for other in SIGNALS} == {signal.SIG_DFL}
    assert stopped.value.status == status
    assert str(stopped.value) == (
        f"stopped by {number.name}: no unfinished files are left; run the same command to start again"
    )


def test_a_signal_that_is_ignored_stays_so():
    """As SIGINT is in what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with signals_raise(), noted_signals() as noted:
        signal.raise_signal(signal.SIGINT)
        assert noted.number is None
        signal.raise_signal(signal.SIGTERM)
        assert (noted.number, signal.getsignal(signal.SIGINT)) == (signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, before)


def test_a_noted_signal_lets_the_work_go_on():
    with signals_raise():
        with noted_signals() as noted:
            assert noted.number is None
            signal.raise_signal(signal.SIGTERM)
            assert noted.number == signal.SIGTERM
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)


def test_the_innermost_advice_is_said():
    with pytest.raises(Stopped, match="stopped by SIGTERM: go on there"), advising("or here"), advising("go on there"):
        raise Stopped(signal.SIGTERM)


def test_a_forked_process_ends_as_any_other():
    with signals_raise():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_other_threads_leave_the_handlers_alone(handlers):
    seen = []

    def look():
        with noted_signals():
            seen.append({number: signal.getsignal(number) for number in SIGNALS})

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [handlers]
