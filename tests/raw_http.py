"""HTTP by hand: connections that send what no client library would, and what the server counts meanwhile."""

import json
import re
import socket
import time

MIB = 2**20
KEY = "a-key"  # of the server `door`
ENVELOPE = {"code", "message", "details", "request_id"}


class Client(socket.socket):
    """A connection to the server that sends bytes as they are."""

    def __init__(self, server, receive_buffer=None):
        super().__init__()
        if receive_buffer:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.settimeout(20)
        self.connect(("127.0.0.1", server.port))
        self.received = b""

    def answer(self):
        """(status, headers, body) of the next answer, which has a Content-Length."""
        while b"\r\n\r\n" not in self.received:
            self._receive()
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        while len(self.received) < int(headers["content-length"]):
            self._receive()
        length = int(headers["content-length"])
        body, self.received = self.received[:length], self.received[length:]
        return int(status.split()[1]), headers, body

    def refusal(self):
        """(status, code, headers) of the next answer, in the envelope, after which the connection ends."""
        status, headers, body = self.answer()
        error = json.loads(body)["error"]
        assert set(error) == ENVELOPE
        assert error["request_id"] == headers["x-request-id"]
        assert headers["content-type"] == "application/json"
        assert headers["connection"] == "close"
        assert self.is_closed()
        return status, error["code"], headers

    def is_closed(self):
        """Whether the server closes the connection, without a further byte."""
        try:
            return not self.received and not self.recv(1)
        except ConnectionResetError:
            return True

    def _receive(self):
        data = self.recv(65_536)
        assert data, f"closed, after {self.received!r}"
        self.received += data


def metric(server, name, **labels):
    text = server.http.get("/metrics").text
    for key, value in labels.items():
        name += f'{{{key}="{value}"}}'
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def head(*lines, request="GET /v1/model HTTP/1.1"):
    return "\r\n".join([request, "Host: h", f"Authorization: Bearer {KEY}", *lines, "", ""]).encode()


def upload(*lines, path="/v1/classify", key=KEY):
    authorization = [] if key is None else [f"Authorization: Bearer {key}"]
    start = [f"POST {path} HTTP/1.1", "Host: h", *authorization, "Content-Type: application/json"]
    return "\r\n".join([*start, *lines, "", ""]).encode()


def multipart_body(*parts):
    """Parts (disposition, bytes) as a multipart body with the boundary `b`."""
    lines = [
        b"--b\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + body + b"\r\n"
        for disposition, body in parts
    ]
    return b"".join(lines) + b"--b--\r\n"
