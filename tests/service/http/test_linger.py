"""When a connection ends, with a clock and a transport of our own: what would take half a minute."""

import asyncio

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from vitrine.service.http.connection import Connection
from vitrine.service.http.door import Door
from vitrine.service.operations.settings import Settings

UPLOAD = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n%s\r\n"
GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


class Clock:
    """An event loop whose time is set by hand."""

    def __init__(self, loop):
        self._loop, self.now = loop, 0.0

    def __getattr__(self, name):
        return getattr(self._loop, name)

    def time(self):
        return self.now


class Transport:
    def __init__(self):
        self.sent, self.closed, self.ended, self.unread = b"", False, False, 0

    def write(self, data):
        assert not self.closed
        assert not self.ended
        self.sent += data

    def close(self):
        self.closed = True

    abort = close

    def is_closing(self):
        return self.closed

    def can_write_eof(self):
        return True

    def write_eof(self):
        self.ended = True

    def get_write_buffer_size(self):
        return self.unread

    def get_extra_info(self, name, default=None):
        return default

    def set_write_buffer_limits(self, high, low):
        assert low == 0

    def pause_reading(self):
        pass

    resume_reading = pause_reading


@pytest.fixture
def scene():
    """scene(conversation, app) runs `conversation(connection, transport, clock, settle)`, an async function."""

    def run(conversation, app=refusing):
        async def talk():
            config = Config(app, log_config=None, access_log=False, lifespan="off")
            config.load()
            clock, transport = Clock(asyncio.get_running_loop()), Transport()
            connection = Connection(Door(Settings()), config, ServerState(), {}, clock)
            connection.connection_made(transport)

            async def settle(seconds=0.0):
                for _ in range(5):
                    await asyncio.sleep(0)
                clock.now += seconds
                connection.check()

            await conversation(connection, transport, clock, settle)
            connection.connection_lost(None)

        asyncio.run(talk())

    return run


async def refusing(scope, receive, send):
    """Answers without reading the body."""
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


@pytest.mark.parametrize(
    ("closing", "end"),
    [
        (b"", "silence"),
        (b"", "too long"),
        (b"Connection: close\r\n", "silence"),
        (b"Connection: close\r\n", "too long"),
        (b"Connection: close\r\n", "too much"),
    ],
    ids=lambda value: value if isinstance(value, str) else "close" if value else "kept",
)
def test_what_comes_after_an_answer_is_read_for_a_while(scene, closing, end):
    async def conversation(connection, transport, clock, settle):
        connection.data_received(UPLOAD % closing + b"x" * 1_000)
        await settle()
        assert b" 401 " in transport.sent
        assert transport.ended == bool(closing)
        for _ in range(2 if end == "silence" else 7):  # 28 s
            await settle(4)
            assert not transport.closed
            connection.data_received(b"x" * 1_000)
        if end == "silence":
            await settle(6)
        elif end == "too long":
            await settle(3)
        else:
            for _ in range(300):
                if not transport.closed:
                    connection.data_received(b"0" * 2**20)
        assert transport.closed

    scene(conversation)


def test_a_kept_connection_is_good_again_when_the_body_has_come(scene):
    async def conversation(connection, transport, clock, settle):
        connection.data_received(UPLOAD % b"")
        await settle()
        for _ in range(10):
            connection.data_received(b"x" * 100_000)
        await settle(70)
        assert not transport.closed
        connection.data_received(GET)
        await settle()
        assert transport.sent.count(b" 401 ") == 2
        await settle(74)
        assert not transport.closed
        await settle(2)
        assert transport.closed

    scene(conversation)


def test_an_answer_that_is_only_left_to_the_transport_has_its_time_too(scene):
    async def conversation(connection, transport, clock, settle):
        connection.data_received(GET)
        transport.unread = 100
        await settle()
        for _ in range(3):  # the client reads everything, now and then
            await settle(50)
            transport.unread = 0
            await settle(1)
            connection.data_received(GET)
            transport.unread = 100
            await settle()
        connection.shutdown()
        await settle(59)
        transport.closed = False
        await settle(2)
        assert transport.closed

    scene(conversation)


def test_a_client_that_leaves_ends_the_request_in_hand_though_it_has_sent_another(scene):
    gone = []

    async def waiting(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.append(scope["path"])

    async def conversation(connection, transport, clock, settle):
        connection.data_received(GET.replace(b"/ ", b"/first ") + GET.replace(b"/ ", b"/second "))
        await settle()
        connection.connection_lost(None)
        await settle()
        assert gone == ["/first"]

    scene(conversation, waiting)


def test_a_server_that_ends_answers_what_is_in_hand(scene):
    async def slow(scope, receive, send):
        await asyncio.sleep(0.01)
        await refusing(scope, receive, send)

    async def conversation(connection, transport, clock, settle):
        connection.data_received(GET)
        await settle()
        connection.shutdown()
        assert not transport.closed
        await asyncio.sleep(0.05)
        assert b" 401 " in transport.sent
        assert b"connection: close" in transport.sent
        assert transport.closed

    scene(conversation, slow)
