"""Every kind of invalid request: status, code and envelope, and the server still works."""

import http.client
import json
import math
import socket
import struct
import zlib

import pytest

from raw_http import multipart_body

LABELS = ["red circle", "green square", "blue triangle"]  # the tiny bundle's


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width, height):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


def damaged_png(picture, chunk, offset):
    """A PNG with one byte changed, `offset` bytes from the type of `chunk`."""
    data = bytearray(picture("PNG"))
    data[data.index(chunk) + offset] ^= 0xFF
    return bytes(data)


BAD_IMAGES = {
    "text": (lambda picture: b"I am a text file.\n" * 20, 415, "unsupported_image"),
    "svg": (
        lambda picture: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        415,
        "unsupported_image",
    ),
    "tga": (lambda picture: picture("TGA"), 415, "unsupported_image"),
    "fractions": (lambda picture: picture("TIFF", "F"), 415, "unsupported_image"),
    "ico": (lambda picture: picture("ICO"), 415, "unsupported_image"),
    "jpeg 2000": (lambda picture: picture("JPEG2000"), 415, "unsupported_image"),
    "postscript": (lambda picture: picture("EPS"), 415, "unsupported_image"),
    "one byte": (lambda picture: b"\xff", 415, "unsupported_image"),
    "truncated jpeg": (lambda picture: picture("JPEG")[:700], 400, "invalid_image"),
    "truncated png": (lambda picture: picture("PNG")[:2000], 400, "invalid_image"),
    "png with a wrong checksum": (lambda picture: damaged_png(picture, b"IHDR", 17), 400, "invalid_image"),
    "truncated header of a png": (lambda picture: picture("PNG")[:20], 400, "invalid_image"),
    "truncated header of a jpeg": (lambda picture: picture("JPEG")[:100], 400, "invalid_image"),
    "truncated webp": (lambda picture: picture("WEBP")[:200], 400, "invalid_image"),
    "truncated gif": (lambda picture: picture("GIF")[:-300], 400, "invalid_image"),
    "truncated bmp": (lambda picture: picture("BMP")[:-300], 400, "invalid_image"),
    "png with damaged data": (lambda picture: damaged_png(picture, b"IDAT", 40), 400, "invalid_image"),
    "png of 0 x 0": (lambda picture: png_header(0, 0), 400, "invalid_image"),
    "png of 30,000 x 30,000": (lambda picture: png_header(30_000, 30_000), 413, "image_too_large"),
    "png of 16,385 x 1": (lambda picture: png_header(16_385, 1), 413, "image_too_large"),
    "png without pixels": (lambda picture: png_header(10, 10), 400, "invalid_image"),
}


@pytest.mark.parametrize("send", ["multipart", "json"])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_image_is_refused(server, picture, refused, send, case):
    make, status, code = BAD_IMAGES[case]
    post = server.post if send == "multipart" else lambda path, image: server.post_json(path, image)
    refused(post("/v1/attribute", make(picture)), status, code)


def test_empty_image_is_refused(server, refused):
    refused(server.post("/v1/attribute", b""), 400, "invalid_image")
    refused(server.post_json("/v1/attribute", b""), 400, "invalid_request")


def test_classify_refuses_alike(server, refused):
    refused(server.post("/v1/classify", b"no image"), 415, "unsupported_image")
    refused(server.post_json("/v1/classify", b"no image"), 415, "unsupported_image")


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "image", "video/mp4", "application/x-www-form-urlencoded"]
)
def test_other_content_types_are_refused(server, picture, refused, content_type):
    headers = {} if content_type is None else {"content-type": content_type}
    refused(server.http.post("/v1/attribute", content=picture(), headers=headers), 415, "unsupported_media_type")


def test_missing_image_is_refused(server, refused):
    refused(server.post("/v1/attribute", request={"top_k": 1}), 400, "missing_image")
    refused(server.http.post("/v1/attribute", json={"top_k": 1}), 400, "missing_image")
    refused(server.http.post("/v1/attribute", json={}), 400, "missing_image")


@pytest.fixture
def bait():
    """A listening socket: (its URL, a function that says whether anything connected)."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)

        def was_contacted():
            try:
                listening.accept()[0].close()
            except BlockingIOError:
                return False
            return True

        yield f"http://127.0.0.1:{listening.getsockname()[1]}/cat.png", was_contacted


def test_no_url_is_fetched(server, refused, bait):
    url, was_contacted = bait
    refused(server.http.post("/v1/attribute", files={"image": (None, url)}), 400, "missing_image")
    refused(server.http.post("/v1/attribute", files={"image": (None, "")}), 400, "missing_image")
    refused(server.post("/v1/attribute", url.encode()), 415, "unsupported_image")
    refused(server.http.post("/v1/attribute", json={"image_base64": url}), 400, "invalid_image")
    response = server.http.post("/v1/attribute", json={"image": url})
    refused(response, 400, response.json()["error"]["code"])
    refused(server.http.post("/v1/attribute", data={"image": url}), 415, "unsupported_media_type")
    assert not was_contacted()


BAD_JSON = {
    "not json": "{",
    "empty": "",
    "single quotes": "{'top_k': 1}",
    "a list": "[]",
    "null": "null",
    "a string": '"top_k"',
    "a number": "1",
    "deeply nested": "[" * 100_000,
    "deeply nested and closed": '{"labels": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a huge integer": '{"top_k": 1' + "0" * 5000 + "}",
    "half a surrogate as a field": '{"\\ud800": 1}',
}


@pytest.mark.parametrize("case", [case for case in BAD_JSON if case != "empty"])
def test_bad_json_part_is_refused(server, picture, refused, case):
    refused(server.post("/v1/attribute", picture(), BAD_JSON[case]), 400, "invalid_request")


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_body_is_refused(server, refused, case):
    refused(server.post_text(BAD_JSON[case]), 400, "invalid_request")


@pytest.mark.parametrize("body", [b"\xff\xfe{", b"\x80", b'{"labels": ["\xed\xa0\x80"]}'])
def test_bytes_that_are_no_text_are_refused(server, picture, refused, body):
    response = server.http.post("/v1/attribute", files={"image": ("a", picture()), "request": ("r", body)})
    refused(response, 400, "invalid_request")
    response = server.post_text(body.replace(b"{", b'{"image_base64": "AAAA", ', 1))
    refused(response, 400, "invalid_request")


BAD_FIELDS = {
    "unknown field": ({"label": ["cat"]}, "label"),
    "unknown field of explain": ({"explain": {"target": "cat"}}, "explain.target"),
    "labels is a string": ({"labels": "cat"}, "labels"),
    "label is a number": ({"labels": ["cat", 1]}, "labels.1"),
    "label is null": ({"labels": [None]}, "labels.0"),
    "label is a list": ({"labels": [["cat"]]}, "labels.0"),
    "no labels": ({"labels": []}, "labels"),
    "empty label": ({"labels": ["cat", ""]}, "labels.1"),
    "blank label": ({"labels": ["cat", " \t\n"]}, "labels.1"),
    "duplicate labels": ({"labels": ["cat", "dog", "cat"]}, "labels"),
    "labels that differ in whitespace": ({"labels": ["cat", " cat"]}, "labels"),
    "half a surrogate as a label": ({"labels": ["\ud800", "cat"]}, "labels.0"),
    "half a surrogate as a template": ({"templates": ["{}\udfff"]}, "templates.0"),
    "half a surrogate as a contrast": ({"explain": {"contrast": "\ud800"}}, "explain.contrast"),
    "templates is a string": ({"templates": "a {}"}, "templates"),
    "no templates": ({"templates": []}, "templates"),
    "template without {}": ({"templates": ["a {}", "a photo"]}, "templates.1"),
    "template with a named place": ({"templates": ["a {label}"]}, "templates.0"),
    "top_k is 0": ({"top_k": 0}, "top_k"),
    "top_k is negative": ({"top_k": -1}, "top_k"),
    "top_k is text": ({"top_k": "many"}, "top_k"),
    "top_k is a fraction": ({"top_k": 1.5}, "top_k"),
    "top_k is digits in quotes": ({"top_k": "5"}, "top_k"),
    "top_k is true": ({"top_k": True}, "top_k"),
    "top_k is null": ({"top_k": None}, "top_k"),
    "top_k is NaN": ({"top_k": math.nan}, "top_k"),
    "top_k is infinite": ({"top_k": math.inf}, "top_k"),
    "top_k is 1e30": ({"top_k": 1e30}, "top_k"),
    "label_set is a list": ({"label_set": ["default"]}, "label_set"),
    "explain is a string": ({"explain": "cat"}, "explain"),
    "no targets": ({"explain": {"targets": []}}, "explain.targets"),
    "targets is a string": ({"explain": {"targets": "cat"}}, "explain.targets"),
    "blank target": ({"explain": {"targets": [" "]}}, "explain.targets.0"),
    "blank contrast": ({"explain": {"contrast": ""}}, "explain.contrast"),
    "contrast is a list": ({"explain": {"contrast": ["cat"]}}, "explain.contrast"),
    "features is negative": ({"explain": {"features": -1}}, "explain.features"),
    "features is NaN": ({"explain": {"features": math.nan}}, "explain.features"),
    "matrix is a list": ({"explain": {"matrix": [True]}}, "explain.matrix"),
    "heatmap is a number": ({"explain": {"heatmap": 2}}, "explain.heatmap"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_field_is_refused_and_named(server, picture, refused, case):
    request, field = BAD_FIELDS[case]
    error = refused(server.post("/v1/attribute", picture(), request), 400, "invalid_request")
    assert error["details"][0]["field"] == field
    assert error["details"][0]["problem"] in error["message"]
    assert field in error["message"]


BEYOND = {
    "3,000 labels": ({"labels": [f"label {i}" for i in range(3000)]}, "invalid_request"),
    "129 templates": ({"templates": [f"{{}} {i}" for i in range(129)]}, "invalid_request"),
    "label of 257 characters": ({"labels": ["x" * 257]}, "invalid_request"),
    "2,048 labels under 9 templates": (
        {"labels": [f"label {i}" for i in range(2048)], "templates": [f"{{}} {i}" for i in range(9)]},
        "invalid_request",
    ),
    "template of 257 characters": ({"templates": ["{}" + "x" * 255]}, "invalid_request"),
    "33 targets": ({"explain": {"targets": LABELS * 11}}, "invalid_request"),
    "unknown label set": ({"label_set": "imagenet"}, "unknown_label_set"),
    "half a surrogate as a label set": ({"label_set": "\ud800"}, "unknown_label_set"),
    "label set and labels": ({"label_set": "default", "labels": ["cat"]}, "invalid_request"),
    "target not among the labels": ({"labels": ["cat"], "explain": {"targets": ["dog"]}}, "invalid_request"),
    "target not among the default labels": ({"explain": {"targets": ["dog"]}}, "invalid_request"),
    "contrast not among the labels": ({"labels": ["cat"], "explain": {"contrast": "dog"}}, "invalid_request"),
    "target in other letters": ({"labels": ["cat"], "explain": {"targets": ["Cat"]}}, "invalid_request"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_is_beyond_the_limits_or_unknown_is_refused(server, picture, refused, case):
    request, code = BEYOND[case]
    refused(server.post("/v1/attribute", picture(), request), 400, code)
    refused(server.post_json("/v1/attribute", picture(), **request), 400, code)


def test_refusals_name_what_is_wrong(server, picture):
    def message(**request):
        return server.post("/v1/attribute", picture(), request).json()["error"]["message"]

    assert "'zebra'" in message(explain={"contrast": "zebra"})
    assert "2,048" in message(labels=[f"label {i}" for i in range(3000)])
    assert "'imagenet'" in message(label_set="imagenet")
    assert "257" in message(labels=["x" * 257])


def test_classify_explains_nothing(server, picture, refused):
    refused(server.post("/v1/classify", picture(), {"explain": {"features": 1}}), 400, "invalid_request")


@pytest.mark.parametrize(
    "fields",
    [{"labels": [1] * 20_000}, {f"field {i}": 1 for i in range(20_000)}, {"x" * 1_000_000: 1}],
    ids=["many wrong labels", "many unknown fields", "a long unknown field"],
)
def test_many_mistakes_are_answered_in_brief(server, picture, refused, fields):
    refused(server.post("/v1/attribute", picture(), fields), 400, "invalid_request")


@pytest.mark.parametrize(
    "text",
    [
        "not base64!",
        "abcde",
        "ab=c",
        "\u00e9\u00e9\u00e9\u00e9",
        "data:image/png;base64",
        "data:image/png,iVBORw0KGgo=",
        "data:image/png;base64,iVBOR!0KGgo=",
        "data:image/png;base64,iVBORw0KGgo=",  # of an image that ends there
        "data:" + "x" * 2_000 + ",",
    ],
)
def test_bad_base64_is_refused(server, refused, text):
    refused(server.http.post("/v1/attribute", json={"image_base64": text}), 400, "invalid_image")


@pytest.mark.parametrize("image", [1, None, ["a"], {"url": "x"}, "\ud800"])
def test_image_of_the_wrong_type_is_refused(server, refused, image):
    text = json.dumps({"image_base64": image})
    refused(server.post_text(text), 400, "invalid_request")


BAD_PARTS = {
    "unknown part": lambda image: [('name="image"; filename="a"', image), ('name="labels"', b"cat")],
    "unknown file": lambda image: [('name="image"; filename="a"', image), ('name="mask"; filename="b"', image)],
    "two images": lambda image: [('name="image"; filename="a"', image)] * 2,
    "an image and a text of that name": lambda image: [('name="image"; filename="a"', image), ('name="image"', b"x")],
    "two requests": lambda image: [('name="image"; filename="a"', image)] + [('name="request"', b"{}")] * 2,
    "many parts": lambda image: [('name="image"; filename="a"', image)] + [('name="request"', b"{}")] * 50,
    "a part without a name": lambda image: [('name="image"; filename="a"', image), ("", b"x")],
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_unexpected_parts_are_refused(server, picture, refused, case):
    body = multipart_body(*BAD_PARTS[case](picture()))
    headers = {"content-type": "multipart/form-data; boundary=b"}
    refused(server.http.post("/v1/attribute", content=body, headers=headers), 400, "invalid_request")


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=", b""),
        ("multipart/form-data; boundary=" + "b" * 300, b""),
        ("multipart/form-data; boundary=b", b"not multipart"),
        ("multipart/form-data; boundary=b", b"--b\r\nno header\0: x\r\n\r\n--b--"),
        ("multipart/form-data; boundary=b; charset=undefined", multipart_body(('name="request"', b"{}"))),
    ],
    ids=["no boundary", "empty boundary", "long boundary", "no parts", "bad part header", "charset 'undefined'"],
)
def test_malformed_multipart_is_refused(server, refused, content_type, body):
    response = server.http.post("/v1/attribute", content=body, headers={"content-type": content_type})
    error = response.json()["error"]["code"]
    assert error in ("invalid_request", "missing_image")
    refused(response, 400, error)


@pytest.mark.parametrize("end", [10, 60, 500], ids=["in its headers", "in the image", "late in the image"])
def test_multipart_that_ends_too_early_is_refused(server, picture, refused, end):
    body = multipart_body(('name="image"; filename="a"', picture()))[:end]
    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = server.http.post("/v1/attribute", content=body, headers=headers)
    assert response.status_code == 400
    refused(response, 400, response.json()["error"]["code"])


LIMIT = 16 * 2**20


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=b", "text/plain"])
@pytest.mark.parametrize("path", ["/v1/attribute", "/v1/classify", "/nowhere"])
def test_announced_body_over_the_limit_is_refused_before_it_comes(server, refused, path, content_type):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest("POST", path)
    connection.putheader("Content-Type", content_type)
    connection.putheader("Content-Length", str(LIMIT + 1))
    connection.endheaders()
    response = connection.getresponse()  # not a byte of the body was sent
    error = json.loads(response.read())["error"]
    connection.close()
    assert (response.status, error["code"]) == (413, "body_too_large")
    assert f"{LIMIT:,}" in error["message"]
    assert response.headers["X-Request-ID"] == error["request_id"]


def test_body_over_the_limit_is_refused(server, refused):
    headers = {"content-type": "application/json"}
    refused(server.http.post("/v1/attribute", content=b" " * (LIMIT + 1), headers=headers), 413, "body_too_large")


@pytest.mark.parametrize(
    ("content_type", "start"),
    [
        ("application/json", b""),
        (
            "multipart/form-data; boundary=b",
            multipart_body(('name="image"; filename="a"', b""))[: -len("\r\n--b--\r\n")],
        ),
        ("multipart/form-data; boundary=b", multipart_body(('name="request"', b""))[: -len("\r\n--b--\r\n")]),
    ],
    ids=["json", "file part", "text part"],
)
def test_unannounced_body_over_the_limit_is_refused(server, refused, content_type, start):
    def chunks():
        yield start
        for _ in range(LIMIT // 2**19 + 1):
            yield b" " * 2**19

    response = server.http.post("/v1/attribute", content=chunks(), headers={"content-type": content_type})
    refused(response, 413, "body_too_large")


def test_image_up_to_the_body_limit_is_taken(server, picture):
    padded = picture("JPEG") + bytes(15 * 2**20)  # what follows a JPEG's end is ignored
    assert server.attribute(padded)["predictions"] == server.attribute(picture("JPEG"))["predictions"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/attribute", "POST"),
        ("PUT", "/v1/attribute", "POST"),
        ("DELETE", "/v1/classify", "POST"),
        ("OPTIONS", "/v1/classify", "POST"),
        ("TRACE", "/v1/attribute", "POST"),
        ("POST", "/v1/model", "GET"),
        ("PATCH", "/v1/model", "GET"),
        ("POST", "/", "GET"),
        ("POST", "/v1/features", "GET"),
    ],
)
def test_wrong_method_is_refused_with_the_right_one(server, refused, method, path, allowed):
    response = server.http.request(method, path)
    refused(response, 405, "method_not_allowed")
    assert allowed in response.headers["allow"].split(", ")


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/nowhere", "/v1", "/v1/attribute/", "/v1/model/x", "/v2/attribute", "/v1/%00"])
def test_unknown_path_is_not_found(server, refused, method, path):
    refused(server.http.request(method, path), 404, "not_found")


def test_a_connection_outlives_an_error(server, picture):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = multipart_body(('name="image"; filename="a"', picture()))
    statuses = []
    for content in (b"junk", body, body[:100], body):
        connection.request("POST", "/v1/attribute", content, {"content-type": "multipart/form-data; boundary=b"})
        response = connection.getresponse()
        response.read()
        statuses.append(response.status)
    connection.close()
    assert statuses == [400, 200, 400, 200]
