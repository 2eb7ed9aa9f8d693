"""Bodies of the Open Inference Protocol: JSON, after which tensors may follow as bytes (its binary data extension).

Of tensors there are lists of bytes, each behind its length, and matrices of float32; all numbers are little-endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrine.service.errors import ServiceError
from vitrine.service.http.requests import load_json
from vitrine.service.schemas.base import validated
from vitrine.service.schemas.open_inference import InferRequest, InputTensor, OutputTensor

LENGTH_HEADER = "Inference-Header-Content-Length"
MAX_ELEMENTS = 100_000  # of one tensor; far more than any request may have images or labels
# of an input: how its bytes are written in JSON, which we see ourselves (MLServer's clients say it)
_PARAMETERS = {"binary_data_size", "content_type"}


class Inputs(NamedTuple):
    """A request, and the elements of its tensors by their names: texts from JSON, bytes from behind it."""

    request: InferRequest
    elements: dict[str, Sequence[str | bytes]]


def parse_infer(body: bytes, header_length: str | None) -> Inputs:
    """A request's JSON and tensors. header_length: the value of `LENGTH_HEADER`; None: all is JSON.

    Raises `ServiceError` invalid_request.
    """
    size = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or len(header_length) > 12 or int(header_length) > len(body):
            raise _invalid(
                f"{LENGTH_HEADER} {header_length[:100]!r} is not a number from 0 to the body's {len(body):,} bytes"
            )
        size = int(header_length)
    request = validated(InferRequest, load_json(body[:size], "the body"))
    rest = memoryview(body)[size:]
    elements: dict[str, Sequence[str | bytes]] = {}
    for tensor in request.inputs:
        if tensor.name in elements:
            raise _invalid(f"the input {tensor.name!r} is sent more than once")
        if unknown := sorted(tensor.parameters.keys() - _PARAMETERS):
            raise _invalid(f"the input {tensor.name!r} has an unknown parameter {unknown[0][:100]!r}")
        length = tensor.parameters.get("binary_data_size")
        if length is None:
            elements[tensor.name] = _of_json(tensor)
        elif not isinstance(length, int) or isinstance(length, bool) or not 0 <= length <= len(rest):
            raise _invalid(
                f"binary_data_size {length!r} of {tensor.name!r} is not a number from 0 to the {len(rest):,} bytes "
                "that follow"
            )
        else:
            if tensor.data is not None:
                raise _invalid(f"the input {tensor.name!r} has both `data` and `binary_data_size`; send one of them")
            elements[tensor.name], rest = _of_bytes(rest[:length], tensor.name), rest[length:]
        _check_shape(tensor, len(elements[tensor.name]))
    if rest:
        raise _invalid(f"{len(rest):,} bytes after the JSON belong to no input; check each `binary_data_size`")
    return Inputs(request, elements)


def _of_json(tensor: InputTensor) -> list[str]:
    if tensor.data is None:
        raise _invalid(f"the input {tensor.name!r} has neither `data` nor `binary_data_size`; send one of them")
    flat: list[Any] = []
    for element in tensor.data:
        flat.extend(element if isinstance(element, list) else [element])
    if not all(isinstance(element, str) for element in flat):
        raise _invalid(f"the data of {tensor.name!r} must only have texts")
    return flat


def _of_bytes(data: memoryview, name: str) -> list[bytes]:
    elements: list[bytes] = []
    while data:
        if len(elements) == MAX_ELEMENTS:
            raise _invalid(f"the input {name!r} has more than {MAX_ELEMENTS:,} elements")
        length = struct.unpack_from("<I", data)[0] if len(data) >= 4 else len(data)
        if 4 + length > len(data):
            raise _invalid(
                f"the bytes of {name!r} end within an element; each element must follow its length, in 4 bytes"
            )
        elements.append(bytes(data[4 : 4 + length]))
        data = data[4 + length :]
    return elements


def _check_shape(tensor: InputTensor, count: int) -> None:
    rows, *rest = tensor.shape
    if rows != count or rest not in ([], [1]):
        raise _invalid(f"the input {tensor.name!r} has {count:,} elements, which do not fit its shape {tensor.shape}")


def texts_of(elements: Sequence[str | bytes], name: str) -> list[str]:
    """Elements that are texts. Raises `ServiceError` for bytes that are not UTF-8."""
    try:
        return [element if isinstance(element, str) else element.decode() for element in elements]
    except UnicodeDecodeError as error:
        raise _invalid(f"an element of {name!r} is not UTF-8") from error


class Output(NamedTuple):
    """A matrix of texts or numbers. as_bytes: whether it is to follow the JSON."""

    name: str
    values: list[list[str]] | NDArray[np.floating]  # [rows, columns]
    as_bytes: bool


def write_infer(head: dict[str, Any], outputs: Sequence[Output]) -> tuple[bytes, int | None]:
    """(an answer's body, the length of its JSON if bytes follow). head: its other fields."""
    tensors, tails = [], []
    for output in outputs:
        rows = output.values
        is_text = isinstance(rows, list)
        shape = [len(rows), len(rows[0])]
        tensor = OutputTensor(name=output.name, datatype="BYTES" if is_text else "FP32", shape=shape)
        if output.as_bytes:
            tails.append(_text_bytes(rows) if isinstance(rows, list) else rows.astype("<f4").tobytes())
            tensor.parameters = {"binary_data_size": len(tails[-1])}
        elif isinstance(rows, list):
            tensor.data = [text for row in rows for text in row]
        else:
            tensor.data = rows.ravel().tolist()
        tensors.append(tensor.model_dump(exclude_none=True))
    text = json.dumps(head | {"outputs": tensors}, ensure_ascii=False).encode()
    return b"".join([text, *tails]), len(text) if tails else None


def _text_bytes(rows: list[list[str]]) -> bytes:
    encoded = [text.encode() for row in rows for text in row]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)


def _invalid(message: str) -> ServiceError:
    return ServiceError("invalid_request", message)
