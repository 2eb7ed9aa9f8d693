"""An image file as text: base64 in either of its alphabets, or a `data:` URL, as browsers and SDKs make it."""

from __future__ import annotations

import binascii
import re

from vitrine.service.errors import ServiceError

# RFC 2397. Of a media type nothing is used: an image is told by its first bytes.
_DATA_URL = re.compile(rb"data:[^,;]*(?:;[^,;]*)*?(;base64)?,", re.IGNORECASE)
_SPACE = b" \t\r\n"
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
MOST_HEAD = 1_024  # characters of a data URL before its data
QUOTED = b"%2b", b"%2f", b"%3d", b"%20", b"%0a", b"%0d"  # what base64 has that URLs quote


def is_data_url(text: str) -> bool:
    return text[:5].lower() == "data:"


def image_of_text(text: str, field: str) -> bytes:
    """The bytes that `text` stands for: base64 (RFC 4648: either alphabet, with or without padding, in lines or in one)
    or a data URL of it. Raises `ServiceError` invalid_image naming the field."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise _invalid(field, f"is not base64: {error}") from error
    if data[:5].lower() == b"data:":
        found = _DATA_URL.match(data[:MOST_HEAD])
        if found is None:
            raise _invalid(field, "is not a valid data URL: there is no comma before its data")
        if not found[1]:
            raise _invalid(field, "is a data URL without base64; send data:…;base64,…")
        data = data[found.end() :]
        if b"%" in data:
            for quoted in QUOTED:
                plain = bytes([int(quoted[1:], 16)])
                data = data.replace(quoted, plain).replace(quoted.upper(), plain)
    data = data.translate(_URL_SAFE, _SPACE).rstrip(b"=")
    try:
        # Strict, so that what is no base64 is not left out silently. One character too many has no padding that fits.
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except binascii.Error as error:
        raise _invalid(field, f"is not base64: {error}") from error


def _invalid(field: str, problem: str) -> ServiceError:
    return ServiceError("invalid_image", f"{field} {problem}", [{"field": field, "problem": f"it {problem}"}])
