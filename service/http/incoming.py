"""What a client sends: uvicorn's parsing of requests, with limits on what has to be kept of them.

A head (URL and headers), trailers and the framing of chunks are limited while they arrive; bodies are held on their
request's `Account`. There are no websockets and no other protocols: a request to switch is answered as if it had not
asked for that.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from vitrine.service.errors import ServiceError
from vitrine.service.http.budget import ACCOUNT, Account, Budget
from vitrine.service.operations.logs import logger

MAX_HEADERS = 100
MAX_PIPELINED = 32  # requests sent ahead; the rest is not read, and the connection closed after their answers


class Incoming(HttpToolsProtocol):
    """Fills uvicorn's cycles, and gives their scopes an `Account`. `_refuse` gets what is no HTTP or over a limit."""

    def __init__(self, max_header_bytes: int, budget: Budget, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ws_protocol_class = None
        self._max_header_bytes, self._budget = max_header_bytes, budget
        self._in_head = self._in_body = False  # of the message that arrives, which may be ahead of the one in hand
        self._loose = 0  # bytes since the parser delivered anything: of a head, trailers, the framing of chunks
        self._stopped = False  # nothing more is parsed
        self._body_after_upgrade = False

    def data_received(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest and not self._stopped:
            room = len(rest) if self._in_body else self._max_header_bytes - self._loose
            if room <= 0:
                self._refuse("headers_too_large", self._too_large())
                return
            rest = rest[self._feed(rest[:room]) :]

    def _refuse(self, reason: str, error: ServiceError) -> None:
        """Stop parsing and answer `error`, after the answers that are due."""
        raise NotImplementedError

    def _feed(self, data: memoryview) -> int:
        """Parse. Returns how many bytes were used."""
        self._loose += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade()
            return int(upgrade.args[0])
        except httptools.HttpParserError as error:
            cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
            if not isinstance(cause, httptools.HttpParserError | None):
                logger.error("a request could not be parsed", exc_info=error)  # not the client's fault
            message = f"the request is not valid HTTP/1.1: {cause or error}"
            self._refuse("not_http", ServiceError("invalid_request", message))
        if self._in_body and self._loose > self._max_header_bytes:
            self._refuse("headers_too_large", self._too_large())
        return len(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        scope: Any = self.scope
        scope[ACCOUNT] = Account(self._budget)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # else a trailer, which must not be taken for a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._loose = False, 0
        if self._stopped:
            return
        if len(self.headers) > MAX_HEADERS:
            self._refuse("headers_too_large", self._too_large())
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._stopped, self.cycle.keep_alive = True, False
        else:
            if self.url[:1] not in b"/*" and httptools.parse_url(self.url).path is None:
                raise httptools.HttpParserInvalidURLError("the URL has no path")
            super().on_headers_complete()
            self._in_body = True
            if self.parser.should_upgrade():
                self._body_after_upgrade = any(
                    name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0 "))
                    for name, value in self.headers
                )

    def on_body(self, body: bytes) -> None:
        self._loose = 0
        cycle = self.cycle
        if self._stopped or cycle.response_complete:
            return
        if account_of(cycle).take(len(body)):
            if not cycle.body:
                cycle.body = body  # type: ignore[assignment]  # passed on without a copy
            else:
                if not isinstance(cycle.body, bytearray):  # `bytes` would be copied for each of many small chunks
                    cycle.body = bytearray(cycle.body)
                cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self._body_after_upgrade:
            return  # the parser takes the body for the other protocol's
        self._in_body, self._loose = False, 0
        if self._stopped or self.cycle.response_complete:
            return
        self.cycle.more_body = False
        self.cycle.message_event.set()

    def _decline_upgrade(self) -> None:
        """Go on as if the client had not asked for another protocol, as RFC 9110 allows (7.8).

        Java's client asks for HTTP/2 in its first request, with a body; then websockets, which could only fail.
        """
        headers = dict(self.headers)
        if self._body_after_upgrade:
            self._body_after_upgrade = False
            callbacks = SimpleNamespace(on_body=self.on_body, on_message_complete=self._on_last_message_complete)
            self.parser = httptools.HttpRequestParser(callbacks)
            framing = (b"transfer-encoding", b"content-length")
            head = [name + b": " + headers[name] + b"\r\n" for name in framing if name in headers]
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(head) + b"\r\n")
            self.cycle.keep_alive = False
        elif headers.get(b"upgrade", b"").lower() == b"websocket":
            self._stopped, self.cycle.keep_alive = True, False
        else:
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _on_last_message_complete(self) -> None:
        self.on_message_complete()
        self._stopped = True

    def _too_large(self) -> ServiceError:
        limit = self._max_header_bytes
        message = f"the URL and headers have more than {limit:,} bytes or {MAX_HEADERS} lines; shorten them"
        return ServiceError("headers_too_large", message)


def account_of(cycle: RequestResponseCycle) -> Account:
    scope: Any = cycle.scope
    account: Account = scope[ACCOUNT]
    return account
