"""The watch over the commands would be worth nothing if it saw nothing."""

import subprocess
import sys

import pytest

from strace import Trace, find_strace

MISDEEDS = """
import os, socket, sys
here = sys.argv[1]
def udp(address, port, data=b""):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
        found.connect((address, port))
        data and found.send(data)
if not os.fork():  # in a child process
    udp("192.0.2.7", 9)
    os._exit(0)
os.wait()
udp("127.0.0.1", 9, b"harmless")
udp("127.0.0.1", 53, b"where is that host?")
udp("127.0.0.53", 53, b"\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\0011\\0010\\0010\\003127\\7in-addr\\4arpa\\0")
open(here + "/allowed/file", "w").close()
os.mkdir(here + "/folder")
os.chdir(here)
open("file", "w").close()
os.rename("file", "other")
"""


@pytest.fixture
def trace(tmp_path):
    if find_strace() is None:
        pytest.skip("strace is not installed (Debian: apt-get install strace)")
    (tmp_path / "allowed").mkdir()
    trace = Trace(tmp_path / "trace")
    subprocess.run(trace.command(sys.executable, "-c", MISDEEDS, tmp_path), check=True, cwd=tmp_path / "allowed")
    return trace


def test_what_is_sent_is_seen(trace):
    elsewhere, question = trace.outbound()
    assert elsewhere == "192.0.2.7:9"
    assert "where is that host?" in question


def test_what_is_written_is_seen(trace, tmp_path):
    found = trace.written(tmp_path / "allowed")
    assert [line for line in found if "rename" not in line] == [
        f"mkdir {tmp_path / 'folder'}",
        f"openat {tmp_path / 'file'}",
    ]
    assert len(found) > 2
