"""What a command's processes send, and where they write, by the system calls that strace sees; and calls that fail.

It sees every process, whatever library starts it and however. Where it is not installed commands run unwatched, unless
VITRINE_REQUIRE_STRACE is set.
"""

import os
import re
import shutil

import pytest

NETWORK = ("connect", "sendto", "sendmsg", "sendmmsg")
FILES = ("creat", "link", "linkat", "mkdir", "mkdirat", "mknod", "mknodat", "open", "openat", "rename", "renameat")
FILES += ("renameat2", "rmdir", "symlink", "symlinkat", "truncate", "unlink", "unlinkat")
# Devices and shared memory are no files of anybody's; libuuid, where it is installed, has a clock for all processes.
DEVICES = ("/dev/null", "/dev/tty", "/dev/shm/", "/proc/", "/var/lib/libuuid/clock.txt")
NAME_SERVICES = {"53", "853", "5353"}  # ports, of this machine's resolver, too
# "1.0.0.127.in-addr.arpa": torch asks for the name of 127.0.0.1 between the processes of a training, and tells nothing.
OWN_NAME = r"\0011\0010\0010\003127\7in-addr"
CALL = re.compile(r"^(\w+)\((.*)\)\s+= (.+)$")
PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
REFUSED = ("EACCES", "EPERM", "EROFS", "ENOSPC")  # it would have been written


def find_strace():
    """Its path, or None. Fails where it is missing and required."""
    path = shutil.which("strace")
    if path is None and os.environ.get("VITRINE_REQUIRE_STRACE"):
        pytest.fail("strace is not installed (Debian: apt-get install strace)")
    return path


def failing(faults):
    """The words before a command by which strace lets system calls fail: {"flock": "ENOLCK", "fsync": "EIO:when=2+"}.

    Skips where strace is missing.
    """
    if (path := find_strace()) is None:
        pytest.skip("strace is not installed (Debian: apt-get install strace)")
    injected = [word for name, error in faults.items() for word in ("-e", f"inject={name}:error={error}")]
    calls = ("-e", f"trace={','.join(faults)}", "-o", os.devnull)
    return [path, "-f", "--seccomp-bpf", "-qq", *calls, *injected]


class Trace:
    """The calls of one command. They are written to `folder`, a file a process."""

    def __init__(self, folder):
        self.folder, self.strace = folder, find_strace()
        folder.mkdir()

    def command(self, *words):
        """The command that runs these words under strace."""
        if self.strace is None:
            return [str(word) for word in words]
        calls = ("-e", f"trace={','.join(NETWORK + FILES)}", "-o", self.folder / "calls")
        return [str(word) for word in (self.strace, "-ff", "--seccomp-bpf", "-qq", "-y", *calls, *words)]

    def _calls(self):
        for file in sorted(self.folder.iterdir()):
            for line in file.read_text(errors="replace").splitlines():
                if match := CALL.match(line):
                    yield match.groups()

    def outbound(self):
        """The addresses beyond this machine that it connected to or sent something, and what it asked name services."""
        found, resolvers = set(), set()
        for name, arguments, _ in self._calls():
            if name not in NETWORK:
                continue
            socket = arguments.partition(",")[0]  # its number and inode
            for host, port in _addresses(arguments):
                if port in NAME_SERVICES:
                    resolvers.add(socket)
                elif not host.removeprefix("::ffff:").startswith(("127.", "::1", "0.0.0.0")):
                    found.add(f"{host}:{port}")
            if "io.systemd.Resolve" in arguments:
                resolvers.add(socket)
            if name != "connect" and socket in resolvers and OWN_NAME not in arguments:
                found.add(f"{name} {arguments}")
        return sorted(found)

    def written(self, *folders):
        """The paths outside these folders that it wrote, or would have if it had been allowed to."""
        allowed, found = (*DEVICES, *map(str, folders)), set()
        for name, arguments, result in self._calls():
            done = not result.startswith("-1") or any(error in result for error in REFUSED)
            if not done or name not in FILES:
                continue
            if name in ("open", "openat") and not re.search("O_WRONLY|O_RDWR|O_CREAT", arguments):
                continue
            for base, path in PATH.findall(arguments):
                if not (full := os.path.normpath(os.path.join(base, path))).startswith(allowed):
                    found.add(f"{name} {full}")
        return sorted(found)


def _addresses(arguments):
    hosts = re.findall(r'inet_(?:addr\(|pton\(AF_INET6, )"([^"]*)"', arguments)
    return zip(hosts, re.findall(r"sin6?_port=htons\((\d+)\)", arguments), strict=True)
