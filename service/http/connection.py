"""HTTP connections: uvicorn's, with limits on what a client may hold open and leave unread.

- A head must come within `header_seconds`; `http.incoming` limits its bytes.
- Answers given before the whole body has come (401, 413, 429) reach clients that are still sending: the connection
  reads on and discards, for a while, before it closes. To close with unread data would reset it, and lose the answer.
- What is written must be read within `send_seconds`.
- Refusals from here have the same envelope as all others.
"""

from __future__ import annotations

import asyncio
import functools
from enum import Enum, auto
from typing import Any

from uvicorn import config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from vitrine.service.errors import ServiceError
from vitrine.service.http.budget import ACCOUNT
from vitrine.service.http.door import Door
from vitrine.service.http.errors import raw_response
from vitrine.service.http.incoming import Incoming, account_of
from vitrine.service.operations import metrics
from vitrine.service.operations.settings import Settings

LINGER_SECONDS = 30.0  # how long what is sent after an answer is discarded
LINGER_IDLE_SECONDS = 5.0  # and how long it may pause
SHUTDOWN_LINGER_SECONDS = 2.0


class _Phase(Enum):
    HEAD = auto()  # a head has not come, or not wholly
    BUSY = auto()  # a request is in hand
    DRAIN = auto()  # it is answered, but its body is still coming
    IDLE = auto()  # all is answered: kept alive
    LINGER = auto()  # ends; the client may still be sending


def install(settings: Settings) -> None:
    """Let every uvicorn server that this process starts use `Connection`."""
    protocol: Any = functools.partial(Connection, Door(settings))
    config.HTTP_PROTOCOLS |= {"auto": protocol, "httptools": protocol}


class Connection(Incoming):
    """One connection, which came in by the `Door`."""

    def __init__(self, door: Door, *args: Any, **kwargs: Any) -> None:
        super().__init__(door.settings.max_header_bytes, door.budget, *args, **kwargs)
        self._door, self._settings = door, door.settings
        self._phase, self._since, self._until = _Phase.HEAD, 0.0, 0.0
        self._discarded = 0
        self._refusal = b""  # to be sent after the answers that are due
        self._running: RequestResponseCycle | None = None
        self._unread_since: float | None = None  # when it was first seen that the client does not read

    # --- the transport's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._socket = transport
        super().connection_made(_LingeringTransport(transport, self))  # type: ignore[arg-type]
        transport.set_write_buffer_limits(high=HIGH_WATER_LIMIT, low=0)
        if self._door.enter(self):
            self._enter(_Phase.HEAD)
        elif self._door.may_answer:
            self._refuse("too_many", _too_many())
        else:
            self._door.refused("too_many", "no file descriptor is left to send an answer")
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self._drop_pipeline()
        self._door.leave(self)
        super().connection_lost(exc)
        self.transport.release()  # type: ignore[attr-defined]  # breaks a circle of references

    def data_received(self, data: bytes) -> None:
        if self._stopped or self._phase in (_Phase.DRAIN, _Phase.LINGER):
            self._discarded += len(data)
            self._since = self.loop.time()
            if self._discarded > self._door.linger_bytes:
                self._socket.close()
                return
            if self._phase is not _Phase.DRAIN:
                return
        super().data_received(data)

    def resume_writing(self) -> None:
        """Everything is sent: `low=0` in `connection_made`."""
        self._unread_since = None
        super().resume_writing()

    def check(self) -> int:
        now, unread = self.loop.time(), self._socket.get_write_buffer_size()
        if not unread:
            self._unread_since = None
        elif self._unread_since is None:
            self._unread_since = now
        elif now - self._unread_since > self._settings.send_seconds:
            self._door.refused(
                "send_timeout", f"the client did not read {unread:,} bytes within {self._settings.send_seconds:g} s"
            )
            self._socket.abort()
            return 0
        if not self._socket.is_closing():
            self._check_phase(now, now - self._since)
        return unread

    def _check_phase(self, now: float, seconds: float) -> None:
        if self._phase is _Phase.HEAD:
            if seconds <= self._settings.header_seconds:
                return
            if self._in_head:
                message = f"the headers did not arrive within {self._settings.header_seconds:g} s"
                self._refuse("header_timeout", ServiceError("request_timeout", message))
            else:  # browsers open connections in advance; an answer that nobody asked for might be taken for another
                self._socket.close()
        elif self._phase is _Phase.IDLE:
            if seconds > self._settings.keep_alive_seconds:
                self._socket.close()
        elif self._phase is not _Phase.BUSY and (seconds > LINGER_IDLE_SECONDS or now > self._until):
            self._socket.close()

    # --- the parser's calls

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._phase is _Phase.IDLE:
            self._enter(_Phase.HEAD)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._phase is _Phase.DRAIN and not self._in_body:
            self._enter(_Phase.IDLE)

    # --- requests and answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        self._enter(_Phase.BUSY)
        self._door.pace.start(self.loop, functools.partial(super()._start_asgi_task, cycle, self._run))

    async def _run(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.app(scope, receive, send)
        finally:
            scope[ACCOUNT].close()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._running = None
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._stopped:
            self._send_refusal()
        elif self._in_body:
            self._discarded, self._until = 0, self.loop.time() + LINGER_SECONDS
            self._enter(_Phase.DRAIN)
        else:
            self._enter(_Phase.HEAD if self._in_head else _Phase.IDLE)

    def shutdown(self) -> None:
        """End, after the answers that are due (uvicorn's call on SIGTERM)."""
        if self._phase is _Phase.DRAIN:
            self.end()
        if self._phase is _Phase.LINGER:
            self._until = min(self._until, self.loop.time() + SHUTDOWN_LINGER_SECONDS)
        elif self._running is None:
            self._socket.close()
        else:
            self.cycle.keep_alive = False

    def end(self) -> None:
        """Close once everything is sent, and the client has had the time to read it."""
        if self.is_ending:
            return
        self._drop_pipeline()
        if not (self._in_head or self._in_body or self._stopped or self.flow.read_paused):
            self._socket.close()  # nothing more is to come
            return
        self._discarded, self._until = 0, self.loop.time() + LINGER_SECONDS
        self._enter(_Phase.LINGER)
        if self._socket.can_write_eof():
            self._socket.write_eof()
        self.flow.resume_reading()

    @property
    def is_ending(self) -> bool:
        return self._phase is _Phase.LINGER or self._socket.is_closing()

    def give_way(self) -> None:
        if self._in_head:
            self._socket.write(raw_response(_too_many(), self.server_state.default_headers))
        self._socket.close()

    # --- refusals

    def _refuse(self, reason: str, error: ServiceError) -> None:
        """Parse nothing more; answer `error`, after the answers that are due, and end."""
        self._door.refused(reason, error.message)
        metrics.REJECTED.labels(error.code).inc()
        self._stopped = True
        if self._phase is not _Phase.DRAIN:  # else the message has its answer
            self._refusal = raw_response(error, self.server_state.default_headers)
        if self._in_body:
            self._give_up_message()
        if self._running is None:
            self._send_refusal()

    def _give_up_message(self) -> None:
        """The body that was arriving will not be complete."""
        if self.pipeline and self.pipeline[0][0] is self.cycle:
            cycle, _ = self.pipeline.popleft()
            account_of(cycle).close()
        elif self._running is self.cycle:
            if self.cycle.response_started:
                self._refusal = b""
            self.cycle.disconnected, self._running = True, None
            self.cycle.message_event.set()

    def _send_refusal(self) -> None:
        if self._refusal and not self._socket.is_closing():
            self._socket.write(self._refusal)
        self.end()

    def _enter(self, phase: _Phase) -> None:
        self._phase, self._since = phase, self.loop.time()
        self._door.waits(self, phase is not _Phase.BUSY)

    def _drop_pipeline(self) -> None:
        for cycle, _ in self.pipeline:
            account_of(cycle).close()
        self.pipeline.clear()


class _LingeringTransport:
    """The transport as uvicorn sees it: its `close` is the connection's `end`."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport = transport
        self._connection: Connection | None = connection
        self.write = transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection is None or self._connection.is_ending

    def close(self) -> None:
        if self._connection is not None:
            self._connection.end()

    def release(self) -> None:
        self._connection = None


def _too_many() -> ServiceError:
    message = "too many connections are open; try again in a second, and reuse connections (keep-alive)"
    return ServiceError("too_many_connections", message, headers={"Retry-After": "1"})
