"""Quotas and limits of control groups of both versions, wherever in the tree, from made-up files of /proc and /sys."""

import os

import psutil
import pytest

from vitrine.service.engine.processors import available_processors, memory_limit

V1 = "35 34 0:30 {visible} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
V1 += "36 34 0:31 {visible} /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n"
V2 = "34 29 0:29 {visible} /sys/fs/cgroup rw,nosuid,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(mountinfo, own, files) -> the root of a machine of 8 processors and 16 GiB with these files."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    total = type("Memory", (), {"total": 16 * 2**30})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: total)

    def make(mountinfo="", own="", **files):
        for name, text in ({"proc/self/mountinfo": mountinfo, "proc/self/cgroup": own} | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def v2(**quotas):
    return {f"sys/fs/cgroup{group}/cpu.max": text for group, text in quotas.items()}


@pytest.mark.parametrize(
    ("text", "processors"),
    [
        ("max 100000\n", 8),
        ("400000 100000\n", 4),
        ("150000 100000\n", 1),
        ("50000 100000\n", 1),
        ("1600000 100000\n", 8),
        ("200000 50000\n", 4),
        ("", 8),
    ],
)
def test_a_containers_quota(machine, text, processors):
    root = machine(V2.format(visible="/"), "0::/\n", **{"sys/fs/cgroup/cpu.max": text})
    assert available_processors(root)[0] == processors


def test_no_groups_at_all(machine):
    assert available_processors(machine()) == (8, "the processors that this process may use")
    assert memory_limit(machine()) == (16 * 2**30, "the machine's memory")


def test_affinity(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert available_processors(machine()) == (2, "the processors that this process may use")


def test_a_systemd_slice_and_what_contains_it(machine):
    """`systemd-run -p CPUQuota=300%`, in a slice that allows less; the sibling's quota is not ours."""
    files = v2(
        **{"/a.slice/vitrine.service": "300000 100000", "/a.slice": "200000 100000", "/b.slice": "100000 100000"}
    )
    root = machine(V2.format(visible="/"), "0::/a.slice/vitrine.service\n", **files)
    processors, why = available_processors(root)
    assert processors == 2
    assert why.endswith("/a.slice)")


def test_version_1_and_groups_in_groups(machine):
    group = "sys/fs/cgroup/cpu,cpuacct"
    files = {
        f"{group}/cpu.cfs_quota_us": "-1",
        f"{group}/cpu.cfs_period_us": "100000",
        f"{group}/docker/cpu.cfs_quota_us": "300000",
        f"{group}/docker/cpu.cfs_period_us": "100000",
        f"{group}/docker/abc/cpu.cfs_quota_us": "600000",
        f"{group}/docker/abc/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": str(2**30),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    }
    root = machine(V1.format(visible="/"), "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n", **files)
    assert available_processors(root)[0] == 3
    assert memory_limit(root)[0] == 2**30


@pytest.mark.parametrize(
    ("visible", "own"),
    [("/docker/abc", "/docker/abc"), ("/", "/"), ("/", "/../../elsewhere"), ("/docker/abc", "/docker/abc/../other")],
    ids=["the host's names", "a namespace of its own", "moved out of it", "moved beside it"],
)
def test_a_container_sees_its_group_as_the_mounted_one(machine, visible, own):
    files = {
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(3 * 2**30),
    }
    root = machine(V1.format(visible=visible), f"5:cpuacct,cpu:{own}\n4:memory:{own}\n0::/\n", **files)
    assert available_processors(root)[0] == 2
    assert memory_limit(root)[0] == 3 * 2**30


def test_both_versions_at_once(machine):
    """As hybrid systems have them: the second mounted beside the first."""
    hybrid = V1.format(visible="/") + V2.format(visible="/").replace("/sys/fs/cgroup rw", "/sys/fs/cgroup/unified rw")
    files = {
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "500000",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/unified/x/cpu.max": "400000 100000",
        "sys/fs/cgroup/unified/memory.max": str(2**30),
        "sys/fs/cgroup/unified/x/memory.max": "max",
    }
    root = machine(hybrid, "3:cpu,cpuacct:/\n0::/x\n", **files)
    assert available_processors(root)[0] == 4
    assert memory_limit(root)[0] == 2**30
