"""Multipart bodies, as the service reads them: whole, in memory, in time proportional to their length.

Starlette's own reading runs on the event loop, writes large parts to temporary files, and decodes names and fields with
whatever codec the client names, some of which take quadratic time. Here only UTF-8 is accepted.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from vitrine.service.errors import ServiceError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks


@dataclass
class Part:
    """One part: its name, whether it was sent as a file, its declared type in lower case, and its contents."""

    name: str = ""
    is_file: bool = False
    media_type: str = ""
    data: bytearray = field(default_factory=bytearray)


class TooManyParts(ServiceError):
    """More parts than the route takes."""


def parse_multipart(content_type: str, body: bytes, max_parts: int) -> list[Part]:
    """The parts of `body`, in order.

    Raises:
        TooManyParts: there are more than `max_parts`; found before their contents are copied.
        ServiceError: invalid_request for anything else that is wrong with the body.
    """
    boundary = _boundary(content_type)
    parts: list[Part] = []
    header_name, header_value = bytearray(), bytearray()
    disposition, ended = b"", False

    def begin_part() -> None:
        nonlocal disposition
        if len(parts) == max_parts:
            raise TooManyParts("invalid_request", f"the multipart body has more than {max_parts} parts")
        disposition = b""
        parts.append(Part())

    def end_header() -> None:
        nonlocal disposition
        if header_name.lower() == b"content-disposition":
            disposition = bytes(header_value)
        elif header_name.lower() == b"content-type":
            parts[-1].media_type = header_value.partition(b";")[0].decode("latin-1").strip().lower()
        header_name.clear()
        header_value.clear()

    def end_headers() -> None:
        _, options = parse_options_header(disposition)
        if b"name" not in options:
            raise _invalid('a part has no `Content-Disposition: form-data; name="…"`')
        parts[-1].name = _utf8(options[b"name"], "the name of a part")
        parts[-1].is_file = b"filename" in options

    def end_body() -> None:
        nonlocal ended
        ended = True

    callbacks: MultipartCallbacks = {
        "on_part_begin": begin_part,
        "on_part_data": lambda data, start, end: parts[-1].data.extend(memoryview(data)[start:end]),
        "on_header_field": lambda data, start, end: header_name.extend(data[start:end]),
        "on_header_value": lambda data, start, end: header_value.extend(data[start:end]),
        "on_header_end": end_header,
        "on_headers_finished": end_headers,
        "on_end": end_body,
    }
    try:
        parser = MultipartParser(boundary, callbacks)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise _invalid(str(error)) from error
    if not ended and body:
        raise _invalid("it ends before its final boundary")
    return parts


def _boundary(content_type: str) -> bytes:
    _, parameters = parse_options_header(content_type)
    charset = _utf8(parameters.get(b"charset", b"utf-8"), "the charset")
    try:
        is_utf8 = codecs.lookup(charset).name in ("utf-8", "ascii")  # ASCII is a part of UTF-8
    except (LookupError, ValueError):  # unknown, or not a name (a null byte)
        is_utf8 = False
    if not is_utf8:
        raise _invalid(f"its charset is {charset[:100]!r}; send UTF-8")
    boundary = parameters.get(b"boundary", b"")
    if not boundary:
        raise _invalid("its Content-Type has no boundary")
    return boundary


def _utf8(text: bytes, what: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise _invalid(f"{what} is not UTF-8") from error


def _invalid(problem: str) -> ServiceError:
    return ServiceError("invalid_request", f"the multipart body cannot be read: {problem}")
