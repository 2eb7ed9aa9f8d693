"""What a client may send, hold open and leave unread: raw sockets against a real server with small limits."""

import json
import threading
import time
from contextlib import ExitStack, closing, suppress

import pytest

from raw_http import KEY, MIB, Client, head, metric, upload, wait_until

# --- heads


@pytest.mark.parametrize(
    "kind", ["one header", "one header in pieces", "many headers", "URL", "trailer", "chunk extension"]
)
def test_heads_over_the_limit_are_refused_while_they_arrive(door, kind):
    before = metric(door, "vitrine_connections_refused_total", reason="headers_too_large")
    chunked = upload("Transfer-Encoding: chunked")
    start, more = {
        "one header": (head()[:-2] + b"X: ", b"x" * 100_000),
        "one header in pieces": (head()[:-2] + b"X: ", b"x" * 1_000),
        "many headers": (head()[:-2], b"X: x\r\n" * 3_000),
        "URL": (b"GET /", b"x" * 100_000),
        "trailer": (chunked + b"1\r\n{\r\n0\r\nX: ", b"x" * 100_000),
        "chunk extension": (chunked + b"1;", b"x" * 100_000),
    }[kind]
    with closing(Client(door)) as client:
        client.sendall(start)
        with suppress(ConnectionError):
            for _ in range(200 if kind == "one header in pieces" else 1):
                client.sendall(more)  # and no end of it
                time.sleep(0.001)
        status, code, _ = client.refusal()
        assert (status, code) == (431, "headers_too_large")
    assert metric(door, "vitrine_connections_refused_total", reason="headers_too_large") == before + 1


def test_two_hundred_small_headers_are_refused_and_many_are_not(door):
    with closing(Client(door)) as client:
        client.sendall(head(*(f"X{i}: x" for i in range(90))))
        assert client.answer()[0] == 200
        client.sendall(head(*(f"X{i}: x" for i in range(200))))
        assert client.refusal()[:2] == (431, "headers_too_large")


def test_a_head_just_within_the_limit_is_taken_in_any_packets(door):
    padding = "x" * (8_192 - len(head("X: ")))
    whole = head(f"X: {padding}")
    assert len(whole) == 8_192
    with closing(Client(door)) as client:
        client.sendall(whole)
        assert client.answer()[0] == 200
        for start in range(0, len(whole), 1_500):
            client.sendall(whole[start : start + 1_500])
            time.sleep(0.005)
        assert client.answer()[0] == 200
        client.sendall(whole[:-2] + b"Y: y\r\n\r\n")
        assert client.refusal()[:2] == (431, "headers_too_large")


def test_bentoml_serve_has_the_same_limits(server):
    with closing(Client(server)) as client:
        client.sendall(head("X: " + "x" * 33_000))
        assert client.refusal()[:2] == (431, "headers_too_large")


def test_a_body_in_the_packets_of_its_head_is_not_counted_as_one(door):
    body = b'{"image_base64": "AAAA"}' + b" " * 60_000
    with closing(Client(door)) as client:
        for _ in range(2):
            client.sendall(upload(f"Content-Length: {len(body)}") + body)
            status, headers, answer = client.answer()
            assert (status, json.loads(answer)["error"]["code"]) == (415, "unsupported_image")
            assert "connection" not in headers
        half = upload(f"Content-Length: {len(body)}", f"X: {'x' * 4_000}")
        client.sendall(half[:3_000])
        time.sleep(0.05)
        client.sendall(half[3_000:] + body)
        assert client.answer()[0] == 415


def test_trailers_are_no_headers(door):
    with closing(Client(door)) as client:
        trailer = f"1\r\n{{\r\n0\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
        client.sendall(upload("Transfer-Encoding: chunked", key=None) + trailer)
        assert client.answer()[0] == 401


def test_a_head_that_does_not_come_is_timed_out(door):
    before = metric(door, "vitrine_connections_refused_total", reason="header_timeout")
    with ExitStack() as stack:
        silent, slow, kept = (stack.enter_context(closing(Client(door))) for _ in range(3))
        kept.sendall(head())
        assert kept.answer()[0] == 200
        kept.sendall(b"GET")
        start = time.monotonic()
        stop = threading.Event()

        def drip():
            for byte in head("X: " + "x" * 1_000):
                if stop.wait(0.05):
                    return
                try:
                    slow.sendall(bytes([byte]))
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        assert slow.refusal()[:2] == (408, "request_timeout")
        stop.set()
        thread.join()
        assert kept.refusal()[:2] == (408, "request_timeout")
        assert silent.is_closed()
        assert 0.5 < time.monotonic() - start < 10
    assert metric(door, "vitrine_connections_refused_total", reason="header_timeout") == before + 2


def test_kept_alive_connections_stay_open_for_as_long_as_is_set(door):
    with closing(Client(door)) as client:
        client.sendall(head())
        assert client.answer()[0] == 200
        time.sleep(1.4)  # longer than a head may take
        client.sendall(head())
        assert client.answer()[0] == 200
        start = time.monotonic()
        assert client.is_closed()
        assert time.monotonic() - start > 1


# --- what is no request for us


def test_pipelined_requests_are_answered_in_their_order_and_not_without_end(door):
    with closing(Client(door)) as client:
        client.sendall(head(request="GET /nowhere HTTP/1.1") + head() + head(request="GET /livez HTTP/1.1"))
        assert [client.answer()[0] for _ in range(3)] == [404, 200, 200]
        client.sendall(head(request="GET /nowhere HTTP/1.1") * 2_000)
        for answered in range(2_000):  # noqa: B007
            status, headers, _ = client.answer()
            assert status == 404
            if headers.get("connection") == "close":
                break
        assert answered < 100
        assert client.is_closed()


GARBAGE = {
    "words": b"garbage\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tunnel": b"CONNECT a:80 HTTP/1.1\r\n\r\n",
    "URL without a path": b"GET http://h HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_what_is_no_http_is_answered_in_the_envelope(door, kind):
    garbage, size = GARBAGE[kind], door.log.stat().st_size
    with closing(Client(door)) as client:
        client.sendall(garbage + b"x" * 300_000)
        assert client.refusal()[:2] == (400, "invalid_request")
    with closing(Client(door)) as client:  # behind a request that is still to be answered
        client.sendall(head() + garbage)
        assert client.answer()[0] == 200
        assert client.refusal()[:2] == (400, "invalid_request")
    assert "ERROR" not in door.log.read_text()[size:]
    assert "Traceback" not in door.log.read_text()[size:]


def test_a_body_that_is_no_http_ends_its_request(door):
    with closing(Client(door)) as client:
        client.sendall(upload("Transfer-Encoding: chunked") + b"2\r\n{}\r\nnonsense\r\n")
        assert client.refusal()[:2] == (400, "invalid_request")


@pytest.mark.parametrize("path", ["/v1/attribute", "/nowhere", "/livez"])
def test_websockets_are_answered_as_ordinary_requests(door, path):
    size = door.log.stat().st_size
    handshake = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA")
    with closing(Client(door)) as client:
        client.sendall(head(*handshake, request=f"GET {path} HTTP/1.1") + b"\x81\x05hello" * 10_000)
        status, headers, _ = client.answer()
        assert status == {"/v1/attribute": 405, "/nowhere": 404, "/livez": 200}[path]
        assert headers["connection"] == "close"
        assert client.is_closed()
    assert "WARNING" not in door.log.read_text()[size:]
    assert "Traceback" not in door.log.read_text()[size:]


def test_a_client_that_would_like_http_2_is_answered_with_its_body(door, picture):
    """As Java's does, with its first request."""
    image = picture()
    body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n' + image + b"\r\n--x--\r\n"
    asks = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA")
    kind = "Content-Type: multipart/form-data; boundary=x"
    with closing(Client(door)) as client:
        client.sendall(head(*asks) + head())
        assert [client.answer()[0] for _ in range(2)] == [200, 200]
        client.sendall(head(*asks, kind, f"Content-Length: {len(body)}", request="POST /v1/classify HTTP/1.1"))
        client.sendall(body[:1_000])
        time.sleep(0.05)
        client.sendall(body[1_000:])
        status, _, answer = client.answer()
        assert (status, len(json.loads(answer)["predictions"])) == (200, 5)


def test_a_client_that_waits_for_leave_to_send_its_body_gets_its_refusal(door):
    with closing(Client(door)) as client:
        client.sendall(upload("Content-Length: 1000", "Expect: 100-continue", key="none"))
        assert client.refusal()[:2] == (401, "unauthorized")
    body = b'{"image_base64": "AAAA"}'
    with closing(Client(door)) as client:
        client.sendall(upload(f"Content-Length: {len(body)}", "Expect: 100-continue"))
        assert client.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert client.answer()[0] == 415


# --- how many


def test_the_longest_waiting_connection_gives_way_and_busy_ones_do_not(door):
    refused = metric(door, "vitrine_connections_refused_total", reason="too_many")
    with ExitStack() as stack:
        new = lambda: stack.enter_context(closing(Client(door)))  # noqa: E731
        first = new()
        first.sendall(head())
        assert first.answer()[0] == 200
        waiting = [new() for _ in range(39)]
        newest = new()
        newest.sendall(head())
        assert newest.answer()[0] == 200
        assert first.is_closed()
        for client in waiting[-30:]:
            client.close()
        busy = []
        for _ in range(40):  # gives way to nobody: its request is being received
            busy.append(new())
            busy[-1].sendall(upload("Content-Length: 10") + b"{")
            time.sleep(0.01)
        over = new()
        status, code, headers = over.refusal()
        assert (status, code) == (503, "too_many_connections")
        assert int(headers["retry-after"]) >= 1
        for client in busy:
            client.sendall(b'"a": 1234')
        assert {client.answer()[0] for client in busy} == {400}
    wait_until(lambda: metric(door, "vitrine_connections") <= 2)
    assert metric(door, "vitrine_connections_limit") == 40
    assert metric(door, "vitrine_connections_refused_total", reason="too_many") >= refused + 2
    lines = [line for line in door.log.read_text().splitlines() if "connection refused, too_many" in line]
    assert 1 <= len(lines) <= 3, "a flood must not fill the log"


# --- bytes in hand


def in_hand(server):
    return metric(server, "vitrine_bytes_in_hand")


def test_uploads_held_open_are_bounded_and_others_refused(door, picture):
    rss = door.workers[0].memory_info().rss
    with ExitStack() as stack:
        held = []
        for _ in range(30):
            client = stack.enter_context(closing(Client(door)))
            client.sendall(upload(f"Content-Length: {8 * MIB}"))  # a declared length holds nothing
            held.append(client)
        assert door.post("/v1/classify", picture(), Authorization=f"Bearer {KEY}").status_code == 200
        for client in held:
            with suppress(ConnectionError):  # refused meanwhile
                client.sendall(b" " * (7 * MIB))
        wait_until(lambda: in_hand(door) > 10 * MIB)
        assert in_hand(door) <= 20 * MIB
        refused = held[-1].answer()
        assert (refused[0], json.loads(refused[2])["error"]["code"]) == (429, "queue_full")
        assert int(refused[1]["retry-after"]) >= 1
        assert door.workers[0].memory_info().rss - rss < 150 * MIB
    wait_until(lambda: in_hand(door) == 0)
    assert door.post("/v1/classify", picture(), Authorization=f"Bearer {KEY}").status_code == 200


def test_a_client_that_does_not_read_is_disconnected(door):
    before = metric(door, "vitrine_connections_refused_total", reason="send_timeout")
    with closing(Client(door, receive_buffer=4_096)) as client:
        client.sendall(head(request="GET /docs/swagger-ui-bundle.js HTTP/1.1") * 30)  # 40 MB
        wait_until(lambda: in_hand(door) > 0)
        assert in_hand(door) < 2 * MIB
        wait_until(lambda: metric(door, "vitrine_connections_refused_total", reason="send_timeout") == before + 1)
        wait_until(lambda: in_hand(door) == 0)
    with closing(Client(door, receive_buffer=4_096)) as client:  # a last answer, wholly in the transport's buffer
        client.sendall(head("Connection: close") * 1)
        assert client.answer()[0] == 200


def test_a_client_that_reads_slowly_gets_its_answer(door):
    """It takes longer than a client may read nothing."""
    with closing(Client(door, receive_buffer=65_536)) as client:
        client.sendall(head(request="GET /docs/swagger-ui-bundle.js HTTP/1.1") * 8)
        end, size = time.monotonic() + 3.5, 0
        while time.monotonic() < end:
            size += len(client.recv(65_536))
            time.sleep(0.02)
        client.received = b""
        client.sendall(head("Connection: close"))
        while data := client.recv(65_536):
            size += len(data)
        assert size > 8 * MIB


# --- few file descriptors

LOW_LIMIT = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
sys.argv[:1] = ["vitrine", "serve"]
runpy.run_module("vitrine", run_name="__main__")
"""


@pytest.fixture(scope="module")
def cramped(start_server):
    """A server that may open 64 files."""
    with start_server(("-c", LOW_LIMIT), VITRINE_SEND_SECONDS=1) as running:
        yield running


def test_idle_connections_do_not_use_up_the_file_descriptors(cramped, picture):
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(closing(Client(cramped)))
        for _ in range(3):
            assert cramped.post("/v1/classify", picture()).status_code == 200
        assert 4 <= metric(cramped, "vitrine_connections_limit") < 40
    assert "ulimit -n" in cramped.log.read_text()


def test_a_server_ends_while_a_client_does_not_read(cramped):
    with closing(Client(cramped, receive_buffer=4_096)) as client:
        client.sendall(head(request="GET /docs/swagger-ui-bundle.js HTTP/1.1") * 30)
        wait_until(lambda: in_hand(cramped) > 0)
        cramped.process.terminate()
        assert cramped.process.wait(20) is not None
