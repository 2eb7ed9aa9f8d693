"""Multipart bodies: UTF-8 alone, every part as it was sent, and time proportional to length."""

import json
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raw_http import multipart_body
from vitrine.service.errors import ServiceError
from vitrine.service.http.multipart import TooManyParts, parse_multipart
from vitrine.service.http.requests import load_json

TYPE = "multipart/form-data; boundary=b"


# Contents made of the very bytes that boundaries are made of.
CONTENTS = st.lists(st.sampled_from([b"\r", b"\n", b"-", b"--b", b"\r\n--", b"\r\n--b", b"b", b"\0", b"\xff"])).map(
    lambda pieces: b"".join(pieces).replace(b"\r\n--b", b"\r\n-b")
)


@given(st.lists(st.tuples(st.sampled_from(["image", "request", "naïve"]), st.booleans(), CONTENTS), max_size=6))
def test_parts_come_out_as_they_went_in(parts):
    parts = [(name, is_file, data) for name, is_file, data in parts if b"\r\n--b" not in b"\r\n" + data]
    body = multipart_body(*((f'name="{name}"' + '; filename="x"' * is_file, data) for name, is_file, data in parts))
    parsed = [(part.name, part.is_file, bytes(part.data)) for part in parse_multipart(TYPE, body, 6)]
    assert parsed == parts


@pytest.mark.parametrize("charset", ["utf-8", "UTF-8", "utf8", "us-ascii", '"utf-8"'])
def test_utf8_by_its_names_is_taken(charset):
    (part,) = parse_multipart(f"{TYPE}; charset={charset}", multipart_body(('name="request"', b"{}")), 1)
    assert part.data == b"{}"


ODD_CHARSETS = [
    "punycode",
    "idna",
    "utf-7",
    "utf-16",
    "latin-1",
    "undefined",
    "zlib",
    "rot13",
    "unicode_escape",
    "?",
    "",
]


@pytest.mark.parametrize("charset", ODD_CHARSETS)
def test_other_charsets_are_refused_before_anything_is_decoded(charset):
    body = multipart_body(('name="request"', b"a" * 300_000))
    with pytest.raises(ServiceError, match="send UTF-8"):  # punycode would take minutes
        parse_multipart(f"{TYPE}; charset={charset}", body, 1)


@pytest.mark.parametrize("charset", ODD_CHARSETS)
def test_a_request_with_another_charset_is_refused(server, picture, charset):
    body = multipart_body(('name="image"; filename="a"', picture()), ('name="request"', b"a" * 300_000))
    headers = {"content-type": f"{TYPE}; charset={charset}"}
    response = server.http.post("/v1/attribute", content=body, headers=headers)
    assert response.status_code == 400
    assert "UTF-8" in response.json()["error"]["message"]


def test_too_many_parts_are_refused_before_they_are_read():
    body = multipart_body(*[('name="image"; filename="a"', b"x")] * 67) + b"this is no part"
    with pytest.raises(TooManyParts):
        parse_multipart(TYPE, body, 66)


LARGE = 2**24
HARD_BODIES = {
    "one carriage return after another": multipart_body(('name="image"; filename="a"', b"\r" * LARGE)),
    "nearly a boundary": multipart_body(('name="image"; filename="a"', b"\r\n--" * (LARGE // 4))),
    "headers without end": b"--b\r\n" + b"A: b\r\n" * (LARGE // 6),
    "one header without end": b"--b\r\nA: " + b"b" * LARGE,
    "nothing but dashes": b"-" * LARGE,
    "what follows the end": multipart_body() + b"\r" * LARGE,
}


@pytest.mark.parametrize("case", HARD_BODIES)
def test_hard_bodies_are_read_in_little_time(case):
    start = time.process_time()
    with suppress(ServiceError):
        parse_multipart(TYPE, HARD_BODIES[case], 3)
    assert time.process_time() - start < 5  # about 0.1; minutes if it were quadratic


@pytest.mark.parametrize(
    "parameters", [";a=" * 10_000, ";" * 30_000, ";a*0=b" * 5_000, "; boundary*=utf-8''x" + "%41" * 9_000]
)
def test_a_hard_content_type_is_read_in_little_time(parameters):
    start = time.process_time()
    with pytest.raises(ServiceError):
        parse_multipart("multipart/form-data" + parameters, b"", 3)
    assert time.process_time() - start < 1  # about 0.03


@pytest.mark.parametrize("value", [b"1", b"[]", b'{"a":1}', b'""'])
def test_json_of_too_many_values_is_refused_unparsed(value):
    """Parsing them would hold the interpreter for up to 1.2 s."""
    with pytest.raises(ServiceError, match="more than 200,000 JSON values"):
        load_json(b"[" + (value + b",") * 200_000 + b"nonsense", "the body")


def test_json_of_too_many_values_is_refused_by_name(server, refused):
    text = json.dumps({"image_base64": "AAAA", "labels": ["a"] * 300_000})
    response = server.post_text(text)
    refused(response, 400, "invalid_request")
    assert "200,000" in response.json()["error"]["message"]
