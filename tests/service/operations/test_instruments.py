"""What a worker measures of itself."""

import asyncio
import subprocess
import sys
import time

import psutil
from prometheus_client import REGISTRY

from vitrine.service.operations import instruments, metrics


def test_a_blocked_loop_is_a_stall_and_memory_is_measured(monkeypatch):
    monkeypatch.setattr(instruments, "MEMORY_INTERVAL", 0.01)

    def longer_than(bound):
        counts = {
            le: REGISTRY.get_sample_value("vitrine_loop_stall_seconds_bucket", {"le": le}) for le in (bound, "+Inf")
        }
        return counts["+Inf"] - counts[bound]

    async def block():
        before = longer_than("0.25")
        async with instruments.running(12_345):
            await asyncio.sleep(0.1)
            time.sleep(0.4)
            await asyncio.sleep(0.1)
            assert len(asyncio.all_tasks()) == 3
        assert longer_than("0.25") == before + 1
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(block())
    assert REGISTRY.get_sample_value("vitrine_loop_stall_max_seconds") >= 0.3
    assert REGISTRY.get_sample_value("vitrine_memory_limit_bytes") == 12_345
    assert REGISTRY.get_sample_value("vitrine_memory_bytes") > 10e6


def test_memory_includes_child_processes():
    before = instruments.resident_memory()
    code = "held = bytearray(80_000_000); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        during = instruments.resident_memory()
        assert during >= before + 0.9 * psutil.Process(child.pid).memory_info().rss
        child.communicate(b"\n")


def test_every_counter_of_a_colleague_is_there():
    """rules.yml alerts on them."""
    assert metrics.DECODER_RESTARTS._labelnames == metrics.CONNECTIONS_REFUSED._labelnames == ("reason",)
