"""How many processors, and how much memory, this process may use: the machine's, or less where control groups say so.

A container, a systemd slice (`CPUQuota=`) or a group within a group may have a quota in any of its ancestors: the least
on the way up counts. Both versions of control groups are read, and both at once, as on hybrid systems. ONNX Runtime
considers only the machine's processors, and is slower for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

_ROOT = Path("/")
_UNLIMITED = 2**60  # version 1 writes a number of about this size for "no limit"


def available_processors(root: Path = _ROOT) -> tuple[int, str]:
    """(processors that this process may use, reason): its CPU affinity, or the quota of a control group if it is lower.

    A quota of 1.5 processors counts as 1: two threads would be halted a quarter of the time. root: of /proc and /sys.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [(quota, group) for group, version in _groups(root, "cpu") if (quota := _quota(group, version))]
    if quotas:
        quota, group = min(quotas)
        if (allowed := max(1, int(quota))) < processors:
            return allowed, f"the container's quota, out of {processors} processors ({group})"
    return processors, "the processors that this process may use"


def memory_limit(root: Path = _ROOT) -> tuple[int, str]:
    """(bytes that this process may use, reason): the machine's memory, or a control group's limit if it is lower."""
    total = psutil.virtual_memory().total
    files = {1: "memory.limit_in_bytes", 2: "memory.max"}
    limits = []
    for group, version in _groups(root, "memory"):
        text = _read(group / files[version])
        if text.isdecimal() and int(text) < _UNLIMITED:
            limits.append((int(text), group))
    if limits and min(limits)[0] < total:
        limit, group = min(limits)
        return limit, f"the container's limit, out of {total / 2**30:.1f} GiB ({group})"
    return total, "the machine's memory"


def _quota(group: Path, version: int) -> float | None:
    """Processors that a control group allows; None: as many as there are."""
    if version == 2:
        quota, _, period = _read(group / "cpu.max").partition(" ")
    else:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal() and int(period):  # else "max", "-1", or no such file
        return int(quota) / int(period)
    return None


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """(directory, version) of the control groups of this process, from its own up to the highest that is visible."""
    mounts = list(_mounts(root, controller))
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 1 if controllers else 2
        if version == 1 and controller not in controllers.split(","):
            continue
        for mounted, visible, of_version in mounts:
            if of_version != version:
                continue
            # In a container the path may be the host's: then what is mounted is the group itself.
            own, top = PurePosixPath(path), PurePosixPath(visible)
            below = own.relative_to(top) if own.is_relative_to(top) and ".." not in own.parts else PurePosixPath()
            for directory in (below, *below.parents):
                yield mounted / directory, version


def _mounts(root: Path, controller: str) -> Iterator[tuple[Path, str, int]]:
    """(directory, the group that it shows, version) of the mounted control groups with this controller."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        first, _, second = line.partition(" - ")
        fields, kind = first.split(" "), second.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        directory = root / fields[4].lstrip("/")
        if kind[0] == "cgroup2":
            yield directory, fields[3], 2
        elif kind[0] == "cgroup" and controller in kind[2].split(","):
            yield directory, fields[3], 1


def _read(path: Path) -> str:
    """The text of a file; empty where it is not there, or not for us to read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
