"""Answers as JSON text, piece by piece.

Serialising holds the GIL, which stops the event loop even from another thread; between two pieces it is free. A piece
is one explanation, one embedding or one prediction, whatever the size of the whole answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json


def json_text(answer: BaseModel) -> bytes:
    """The same JSON as `answer.model_dump_json()`, made of small pieces. Call it in a thread."""
    return b"".join(_pieces(answer))


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, BaseModel):
        start = b"{"
        for name, field in value:
            yield start + to_json(name) + b":"
            yield from _pieces(field)
            start = b","
        yield b"}"
    elif isinstance(value, list) and value and isinstance(value[0], BaseModel | list):
        start = b"["
        for item in value:
            yield start + to_json(item, inf_nan_mode="null")
            start = b","
        yield b"]"
    else:
        yield to_json(value, inf_nan_mode="null")
