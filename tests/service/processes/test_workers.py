"""A worker that has been told to end does so in time, even where no other thread of it can run."""

import signal

import pytest

PROGRAM = """
import ctypes, os, signal, sys, threading, time
from vitrine.service.processes.workers import end_in_time

asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append("the server's own handler"))
with end_in_time(0.5):
    os.kill(os.getpid(), signal.SIGTERM)
    print(*asked, flush=True)
    {stuck}
"""
STUCK = {
    "a thread that never ends": ("threading.Event().wait()", 75),
    "code that lets no other thread run": ("ctypes.PyDLL(None).sleep(50)", -signal.SIGALRM),
}


@pytest.mark.parametrize("case", STUCK)
def test_a_worker_that_is_stuck_ends_in_time(run_python, case):
    stuck, status = STUCK[case]
    finished = run_python("-c", PROGRAM.format(stuck=stuck))
    assert finished.returncode == status, finished.stderr
    assert finished.stdout == "the server's own handler\n"
