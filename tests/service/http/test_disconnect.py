"""A client that disconnects frees its place: statuses with a real server, places with an app in this process."""

import asyncio
import socket
import time

from prometheus_client import REGISTRY

from vitrine.service.http.application import create_app
from vitrine.service.operations.settings import Settings


def multipart(image, path="/v1/attribute", cut=0):
    """The bytes of a whole request, or all but the last `cut` of them."""
    body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n' + image + b"\r\n--x--\r\n"
    head = f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    whole = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    return whole[: len(whole) - cut]


class Client:
    """The ASGI side of one request, whose client disconnects on `disconnect()`."""

    def __init__(self, app, image):
        head, _, self._body = multipart(image).partition(b"\r\n\r\n")
        self._disconnected, self.sent = asyncio.Event(), []
        headers = [
            tuple(
                part.strip().lower() if place == 0 else part.strip() for place, part in enumerate(line.split(b":", 1))
            )
            for line in head.split(b"\r\n")[1:]
        ]
        scope = {"type": "http", "method": "POST", "path": "/v1/attribute", "headers": headers, "query_string": b""}
        self.task = asyncio.create_task(app({**scope, "asgi": {"version": "3.0"}}, self._receive, self._send))

    def disconnect(self):
        self._disconnected.set()

    async def _receive(self):
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        self.sent.append(message)


async def wait_until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_client_that_disconnects_frees_its_place_in_the_queue(bundle_path, picture, gate):
    async def scene():
        app = create_app(Settings(bundle=bundle_path, queue_size=2, batch_size=1))
        async with app.router.lifespan_context(app):
            attributor = app.state.serving.attributor
            queued = REGISTRY.get_sample_value("vitrine_queue_images")
            gate.clear()
            running = Client(app, picture())
            await wait_until(lambda: attributor._in_flight == 1 and not attributor.batcher.waiting)
            waiting = [Client(app, picture(seed=seed)) for seed in (1, 2)]
            await wait_until(lambda: attributor.batcher.waiting == 2)
            assert REGISTRY.get_sample_value("vitrine_queue_images") == queued + 2
            waiting[0].disconnect()
            await wait_until(lambda: attributor.batcher.waiting == 1)
            assert attributor._in_flight == 2
            running.disconnect()  # its inference cannot be stopped, but its place is free
            await wait_until(lambda: attributor._in_flight == 1)
            gate.set()
            await asyncio.gather(*(client.task for client in (running, *waiting)))
            assert waiting[1].sent[0]["status"] == 200
            assert waiting[0].sent[0]["status"] == running.sent[0]["status"] == 499
            assert REGISTRY.get_sample_value("vitrine_queue_images") == queued
            assert REGISTRY.get_sample_value("vitrine_images_in_flight") == 0

    asyncio.run(scene())


def test_clients_that_disconnect_are_counted_and_nothing_is_logged_as_an_error(server, picture):
    def disconnects():
        series = 'vitrine_requests_total{endpoint="/v1/attribute",status="499"} '
        return next(
            (
                float(line.removeprefix(series))
                for line in server.http.get("/metrics").text.splitlines()
                if series in line
            ),
            0,
        )

    before, size = disconnects(), server.log.stat().st_size
    for _ in range(20):  # half a body, then nothing
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(multipart(picture(), cut=100))
    end = time.monotonic() + 20
    while disconnects() < before + 20:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "ERROR" not in server.log.read_text()[size:]
    assert server.attribute(picture())["predictions"]
