"""Images as browsers, SDKs and shells send them: data URLs, parts without names, lists, bodies as they are, gzip."""

import asyncio
import base64
import gzip
import json
import string
import zlib
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from raw_http import multipart_body
from vitrine.service.errors import ServiceError
from vitrine.service.http.budget import ACCOUNT, Account, Budget
from vitrine.service.http.content import inflate, parse_body
from vitrine.service.http.image_text import image_of_text

MULTIPART = {"content-type": "multipart/form-data; boundary=b"}
LABELS = {"labels": ["cat", "dog"]}


def predictions(response):
    assert response.status_code == 200, response.text
    return response.json()["predictions"]


@pytest.fixture
def expected(server, picture):
    """The predictions of the picture, sent as a file."""
    return predictions(server.post("/v1/classify", picture("JPEG"), LABELS))


# Images as text


HEADS = ["", "data:image/jpeg;base64,", "data:;base64,", "DATA:image/PNG;name=a.png;BASE64,"]
LINE_ENDS = ["", "\n", "\r\n", " ", "\t"]


@given(st.binary(), st.sampled_from(HEADS), st.booleans(), st.booleans(), st.sampled_from(LINE_ENDS))
def test_every_way_of_writing_base64_is_read(data, head, url_safe, padded, line_end):
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(data).decode()
    text = text if padded else text.rstrip("=")
    lines = [text[start : start + 76] for start in range(0, len(text), 76)]
    assert image_of_text(head + line_end.join(lines), "image_base64") == data


@given(st.binary())
def test_quoted_data_urls_are_read(data):
    text = base64.b64encode(data).decode()
    for quoted in (text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"), text.replace("+", "%2b")):
        assert image_of_text(f"data:image/png;base64,{quoted}", "image_base64") == data


@given(st.text(st.characters(exclude_characters=f"+/-_=, \t\r\n{string.ascii_letters}{string.digits}"), min_size=1))
def test_other_texts_are_refused_as_no_image(text):
    for some in (text, f"data:{text}", f"data:;base64,{text}", f"AAAA{text}"):
        with pytest.raises(ServiceError, match=r"image_base64 is (not|a data URL without)") as refusal:
            image_of_text(some, "image_base64")
        assert refusal.value.code == "invalid_image"


@pytest.mark.parametrize("head", ["", "data:image/jpeg;base64,", "data:;base64,"])
@pytest.mark.parametrize("alphabet", [base64.b64encode, base64.urlsafe_b64encode])
def test_a_data_url_is_the_file(server, picture, expected, head, alphabet):
    text = head + alphabet(picture("JPEG")).decode().rstrip("=")
    assert predictions(server.http.post("/v1/classify", json=LABELS | {"image_base64": text})) == expected
    batch = server.http.post("/v1/attribute:batch", json=LABELS | {"images_base64": [text, "?"]}).json()
    assert batch["results"][0]["answer"]["predictions"] == expected
    assert batch["results"][1]["error"]["code"] == "invalid_image"


# Parts


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_part_without_a_file_name_is_a_file(server, picture, kind):
    body = multipart_body(('name="image"', picture(kind)), ('name="request"', json.dumps(LABELS).encode()))
    response = server.http.post("/v1/classify", content=body, headers=MULTIPART)
    assert predictions(response) == predictions(server.post("/v1/classify", picture(kind), LABELS))


def test_a_part_with_an_images_type_is_a_file_whatever_it_has(server, refused):
    body = multipart_body(('name="image"\r\nContent-Type: Image/JPEG; x=y', b"text"))
    refused(server.http.post("/v1/classify", content=body, headers=MULTIPART), 415, "unsupported_image")
    body = multipart_body(('name="image"', b"text"))
    refused(server.http.post("/v1/classify", content=body, headers=MULTIPART), 400, "missing_image")


def test_a_field_may_be_a_data_url(server, picture, expected):
    text = "data:image/jpeg;base64," + base64.b64encode(picture("JPEG")).decode()
    files = {"image": (None, text), "request": (None, json.dumps(LABELS))}
    assert predictions(server.http.post("/v1/classify", files=files)) == expected


@pytest.mark.parametrize("names", [["image[]"] * 3, ["image[0]", "image[1]", "image[2]"], ["image"] * 3])
def test_lists_of_files_are_a_batch(server, picture, names):
    images = [picture(seed=seed) for seed in range(3)]
    alone = [predictions(server.post("/v1/classify", image, LABELS)) for image in images]
    files = [(name, ("a.png", image)) for name, image in zip(names, images, strict=True)]
    if "2" in names[2]:
        files.reverse()
    files.append(("request", (None, json.dumps(LABELS))))
    results = server.http.post("/v1/attribute:batch", files=files).json()["results"]
    assert [result["answer"]["predictions"] for result in results] == alone


def test_a_list_of_one_file_is_an_image_and_of_two_is_not(server, picture, expected, refused):
    part = ("image[]", ("a.jpg", picture("JPEG")))
    request = ("request", (None, json.dumps(LABELS)))
    assert predictions(server.http.post("/v1/classify", files=[part, request])) == expected
    refused(server.http.post("/v1/classify", files=[part, part]), 400, "invalid_request")
    for name in ("images", "image[x]", "image[", "image[1][2]", "image[9999999]"):
        refused(server.http.post("/v1/classify", files=[(name, part[1])]), 400, "invalid_request")


# The image as it is, and fields in the query


@pytest.mark.parametrize("content_type", ["image/jpeg", "image/png", "IMAGE/*; q=1", "application/octet-stream"])
def test_a_body_may_be_the_image(server, picture, content_type):
    image, headers = picture("JPEG"), {"content-type": content_type}
    plain = predictions(server.post("/v1/classify", image))
    assert predictions(server.http.post("/v1/classify", content=image, headers=headers)) == plain


def test_its_options_are_in_the_query(server, picture, refused):
    image, headers = picture("JPEG"), {"content-type": "image/jpeg"}
    options = {"labels": ["cat", "a dog"], "templates": ["a {}"], "top_k": 1, "explain": {"features": 2, "lens": True}}
    query = options | {"explain": json.dumps(options["explain"])}
    expected = server.attribute(image, **options)
    for content in ({"content": image, "headers": headers}, {"files": {"image": ("a", image)}}):
        answer = server.http.post("/v1/attribute", params=query, **content).json()
        assert (answer["predictions"], answer["explanations"], answer["lens"]) == (
            expected["predictions"],
            expected["explanations"],
            expected["lens"],
        )
    named = server.http.post("/v1/classify?label_set=pets", content=image, headers=headers)
    assert predictions(named) == predictions(server.post("/v1/classify", image, {"label_set": "pets"}))
    batch = server.http.post("/v1/attribute:batch?top_k=1", content=image, headers=headers).json()
    assert [len(result["answer"]["predictions"]) for result in batch["results"]] == [1]
    embedding = server.http.post("/v1/embed?texts=cat&texts=dog", content=image, headers=headers).json()
    assert embedding["embedding"] == server.post("/v1/embed", image).json()["embedding"]
    assert len(embedding["text_embeddings"]) == 2


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("topk=1", "there is no query parameter 'topk'"),
        ("image_base64=AAAA", "there is no query parameter"),
        ("top_k=1&top_k=2", "more than once"),
        ("top_k=x", "not JSON"),
        ("top_k=", "not JSON"),
        ("top_k=0", "top_k: "),
        ("explain=[", "not JSON"),
        ("labels=", "labels.0: "),
        ("strict=1", "strict: "),
    ],
)
def test_bad_options_in_the_query_are_refused(server, picture, refused, query, says):
    response = server.http.post(f"/v1/attribute?{query}", content=picture(), headers={"content-type": "image/png"})
    assert says in refused(response, 400, "invalid_request")["message"]
    refused(server.http.post(f"/v1/attribute?{query}", files={"image": ("a", picture())}), 400, "invalid_request")


def test_a_field_is_sent_once(server, picture, refused):
    response = server.http.post("/v1/classify?top_k=1", json={"image_base64": "AAAA", "top_k": 1})
    assert "'top_k' is both in the query and in the body" in refused(response, 400, "invalid_request")["message"]


def test_an_empty_body_is_an_empty_image(server, refused):
    refused(server.http.post("/v1/classify", headers={"content-type": "image/png"}), 400, "invalid_image")
    response = server.http.post("/v1/classify", content=b"x", headers={"content-type": "image/png"})
    refused(response, 415, "unsupported_image")


# Compressed bodies


@pytest.mark.parametrize(
    ("coding", "compress"),
    [("gzip", gzip.compress), ("X-GZIP", gzip.compress), ("deflate", zlib.compress)],
)
def test_compressed_bodies_are_inflated(server, picture, expected, coding, compress):
    image = picture("JPEG")
    text = json.dumps(LABELS | {"image_base64": base64.b64encode(image).decode()}).encode()
    parts = multipart_body(('name="image"; filename="a"', image), ('name="request"', json.dumps(LABELS).encode()))
    bodies = {"application/json": text, MULTIPART["content-type"]: parts, "image/jpeg": image}
    for kind, body in bodies.items():
        headers = {"content-type": kind, "content-encoding": coding}
        path = "/v1/classify" + ("?labels=cat&labels=dog" if kind == "image/jpeg" else "")
        assert predictions(server.http.post(path, content=compress(body), headers=headers)) == expected


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "gzip;q=1", "x"])
def test_other_codings_are_refused_by_name(server, refused, coding):
    headers = {"content-type": "application/json", "content-encoding": coding}
    response = server.http.post("/v1/classify", content=b"{}", headers=headers)
    assert f"Content-Encoding '{coding}'" in refused(response, 415, "unsupported_media_type")["message"]
    assert response.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{}", "cannot be decompressed as gzip"),
        (b"", "ends before the end of its gzip stream"),
        (gzip.compress(b"{}")[:-1], "ends before the end of its gzip stream"),
        (gzip.compress(b"{}") + b"x", "continues after the end of its gzip stream"),
        (gzip.compress(b"{}") * 2, "continues after the end of its gzip stream"),
    ],
)
def test_damaged_compressed_bodies_are_refused(server, refused, body, says):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = server.http.post("/v1/classify", content=body, headers=headers)
    assert says in refused(response, 400, "invalid_request")["message"]


def test_a_body_is_inflated_up_to_the_limit(server, refused):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    bomb = gzip.compress(bytes(2**28), 9)
    refused(server.http.post("/v1/classify", content=bomb, headers=headers), 413, "body_too_large")
    assert inflate(gzip.compress(b"x" * 100), "gzip", 100) == b"x" * 100
    with pytest.raises(ServiceError, match="larger than 99 bytes after decompression"):
        inflate(gzip.compress(b"x" * 100), "gzip", 99)


@pytest.mark.parametrize(("room", "fits"), [(3_000, True), (2_999, False)])
def test_what_is_inflated_counts_as_bytes_in_hand(room, fits):
    budget = Budget(room)
    app = SimpleNamespace(state=SimpleNamespace(settings=SimpleNamespace(max_body_bytes=10_000)))
    headers = [(b"content-encoding", b"gzip")]
    scope = {"type": "http", "headers": headers, "app": app, ACCOUNT: Account(budget)}

    async def receive():
        return {"type": "http.request", "body": gzip.compress(b"x" * 3_000)}

    parsed = parse_body(Request(scope, receive), len)
    if fits:
        assert asyncio.run(parsed) == budget.held == 3_000
    else:
        with pytest.raises(ServiceError, match="too many bytes of uploads"):
            asyncio.run(parsed)
    scope[ACCOUNT].close()
    assert budget.held == 0
