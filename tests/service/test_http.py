"""The contract (v1) through a real server process: answers, errors, probes, metrics."""

import asyncio
import base64
import http.client
import json
import math
import re
import shutil
import socket
import struct
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import httpx
import numpy as np
import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from models.bundle import BundleError, Manifest, seal
from service.attributor import Attributor
from service.engine import Engine
from service.routes import create_app
from service.settings import Settings

LABELS = ["red circle", "green square", "blue triangle"]  # the tiny bundle's
LAYERS, ACTIVE = 3, 8
EVERYTHING = {"targets": LABELS, "features": ACTIVE}


def as_json(server, path, image, **fields):
    return post_raw_json(server, json.dumps({"image_base64": base64.b64encode(image).decode(), **fields}), path)


def post_raw_json(server, text, path="/v1/attribute"):
    return server.http.post(path, content=text, headers={"content-type": "application/json"})


def ledger_sum(ledger):
    rows = ledger["prior"] + sum(ledger["attention"]) + sum(ledger["clt"]) + ledger["bias"] + ledger["error"]
    return rows + ledger["remainder"]


def without_timings(answer):
    return {key: value for key, value in answer.items() if key not in ("request_id", "timings_ms")}


# Answers


def test_multipart_and_json_give_the_same_answer(server, picture):
    asked = {"labels": ["cat", "dog"], "top_k": 1, "explain": {"targets": ["dog"], "contrast": "cat", "features": 2}}
    multipart = server.attribute(picture(), **asked)
    plain = as_json(server, "/v1/attribute", picture(), **asked)
    assert plain.status_code == 200
    assert without_timings(plain.json()) == without_timings(multipart)


def test_request_part_may_be_a_file_as_well(server, picture):
    files = {"image": ("a.png", picture()), "request": ("r.json", b'{"top_k": 1}', "application/json")}
    response = server.http.post("/v1/attribute", files=files)
    assert response.status_code == 200
    assert len(response.json()["predictions"]) == 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_every_format_is_answered(server, picture, format):
    assert server.attribute(picture(format))["predictions"]


def test_answer_has_exactly_the_fields_of_the_contract(server, picture):
    answer = server.attribute(picture())
    assert set(answer) == {"request_id", "model", "predictions", "explanations", "fidelity", "timings_ms"}
    assert set(answer["model"]) == {"name", "digest"}
    assert set(answer["fidelity"]) == {"r2", "cosine", "error_share", "reconstructed_top1_agrees"}
    assert set(answer["timings_ms"]) == {"decode", "labels", "queue", "inference", "ledger"}
    assert all(set(prediction) == {"label", "probability", "logit"} for prediction in answer["predictions"])
    (explanation,) = answer["explanations"]
    assert set(explanation) == {"target", "contrast", "logit", "ledger", "layers", "heatmap"}
    assert set(explanation["ledger"]) == {"prior", "attention", "clt", "bias", "error", "remainder"}
    assert len(explanation["ledger"]["attention"]) == len(explanation["ledger"]["clt"]) == LAYERS
    for layer in explanation["layers"]:
        assert set(layer) == {"layer", "contribution", "share", "projection", "drop_effect", "features"}
        for feature in layer["features"]:
            assert set(feature) == {"index", "activation", "contribution", "label", "label_score"}


def test_the_top_label_is_explained_by_default(server, picture):
    answer = server.attribute(picture())
    (explanation,) = answer["explanations"]
    assert explanation["target"] == answer["predictions"][0]["label"]
    assert explanation["logit"] == pytest.approx(answer["predictions"][0]["logit"], abs=1e-4)
    assert explanation["contrast"] is None
    assert server.attribute(picture(), explain={"features": 5})["explanations"] == [explanation]


def test_ledgers_add_up(server, picture):
    for explanation in server.attribute(picture(), explain=EVERYTHING)["explanations"]:
        ledger = explanation["ledger"]
        assert ledger_sum(ledger) == pytest.approx(explanation["logit"], abs=1e-9)
        assert abs(ledger["remainder"]) <= 1e-3


def test_layers_say_what_the_ledger_says(server, picture):
    for explanation in server.attribute(picture(), explain=EVERYTHING)["explanations"]:
        ledger, layers = explanation["ledger"], explanation["layers"]
        assert [layer["layer"] for layer in layers] == list(range(LAYERS))
        assert [layer["contribution"] for layer in layers] == ledger["clt"]
        gross = sum(map(abs, [*ledger["attention"], *ledger["clt"], ledger["prior"], ledger["bias"], ledger["error"]]))
        assert [layer["share"] for layer in layers] == pytest.approx([abs(row) / gross for row in ledger["clt"]])
        assert sum(layer["projection"] for layer in layers) == pytest.approx(1, abs=1e-4)
        assert all(-1 <= layer["drop_effect"] <= 1 for layer in layers)


def test_features_are_sorted_and_sum_to_their_layers_row(server, picture):
    for explanation in server.attribute(picture(), explain=EVERYTHING)["explanations"]:
        for layer in explanation["layers"]:
            contributions = [feature["contribution"] for feature in layer["features"]]
            assert len(contributions) <= ACTIVE
            assert contributions == sorted(contributions, key=abs, reverse=True)
            assert sum(contributions) == pytest.approx(layer["contribution"], abs=1e-4)
            assert all(feature["activation"] > 0 for feature in layer["features"])
            assert len({feature["index"] for feature in layer["features"]}) == len(contributions)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_features_are_the_first_of_all(server, picture, count):
    everything = server.attribute(picture(), explain={"features": ACTIVE})["explanations"][0]["layers"]
    some = server.attribute(picture(), explain={"features": count})["explanations"][0]["layers"]
    assert [layer["features"] for layer in some] == [layer["features"][:count] for layer in everything]


def test_probabilities_of_all_labels_sum_to_one(server, picture):
    predictions = server.attribute(picture(), top_k=len(LABELS))["predictions"]
    assert {prediction["label"] for prediction in predictions} == set(LABELS)
    assert sum(prediction["probability"] for prediction in predictions) == pytest.approx(1)
    logits = [prediction["logit"] for prediction in predictions]
    assert logits == sorted(logits, reverse=True)
    odds = [math.exp(logit) for logit in logits]
    assert [p["probability"] for p in predictions] == pytest.approx([value / sum(odds) for value in odds], rel=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 1000])
def test_top_k_limits_the_predictions_and_not_the_softmax(server, picture, top_k):
    everything = server.attribute(picture())["predictions"]
    assert server.attribute(picture(), top_k=top_k)["predictions"] == everything[:top_k]


def test_contrast_is_the_difference_of_two_single_ledgers(server, picture):
    singles = {e["target"]: e for e in server.attribute(picture(), explain=EVERYTHING)["explanations"]}
    contrast, *others = LABELS
    asked = {"targets": others, "contrast": contrast, "features": ACTIVE}
    for explanation in server.attribute(picture(), explain=asked)["explanations"]:
        this, that = singles[explanation["target"]], singles[contrast]
        assert explanation["contrast"] == contrast
        assert explanation["logit"] == pytest.approx(this["logit"] - that["logit"], abs=1e-4)
        for row in ("prior", "bias", "error"):
            expected = this["ledger"][row] - that["ledger"][row]
            assert explanation["ledger"][row] == pytest.approx(expected, abs=1e-4)
        for rows in ("attention", "clt"):
            expected = [a - b for a, b in zip(this["ledger"][rows], that["ledger"][rows], strict=True)]
            assert explanation["ledger"][rows] == pytest.approx(expected, abs=1e-4)
        assert [layer["drop_effect"] for layer in explanation["layers"]] == pytest.approx(
            [layer["drop_effect"] for layer in this["layers"]]
        )


def test_contrast_with_itself_is_nothing_and_no_error(server, picture):
    (explanation,) = server.attribute(picture(), explain={"targets": LABELS[:1], "contrast": LABELS[0]})["explanations"]
    assert explanation["logit"] == 0
    assert [layer["share"] for layer in explanation["layers"]] == [0] * LAYERS


def test_several_targets_come_in_the_order_asked_for(server, picture):
    wanted = [LABELS[2], LABELS[0]]
    both = server.attribute(picture(), explain={"targets": wanted})["explanations"]
    assert [explanation["target"] for explanation in both] == wanted
    alone = [server.attribute(picture(), explain={"targets": [target]})["explanations"][0] for target in wanted]
    assert both == alone


def test_one_label_is_certain(server, picture):
    (prediction,) = server.attribute(picture(), labels=["cat"])["predictions"]
    assert prediction["probability"] == 1


def test_templates_change_the_labels_embedding(server, picture):
    plain = server.attribute(picture(), templates=["{}"])["predictions"]
    other = server.attribute(picture(), templates=["a blurry photo of many {}, or of one {}"])["predictions"]
    assert {p["label"]: p["logit"] for p in plain} != {p["label"]: p["logit"] for p in other}


def test_the_bundles_own_labels_and_templates_are_the_default(server, picture):
    text = server.http.get("/v1/model").json()["manifest"]["text"]
    assert text["labels"] == LABELS
    default = without_timings(server.attribute(picture()))
    assert without_timings(server.attribute(picture(), label_set="default")) == default
    assert without_timings(server.attribute(picture(), labels=LABELS, templates=text["templates"])) == default
    nothing = server.post("/v1/attribute", picture(), '{"labels": null, "label_set": null, "templates": null}')
    assert without_timings(nothing.json()) == default


def test_order_of_labels_does_not_matter(server, picture):
    one = server.attribute(picture(), labels=["cat", "dog", "car"])
    other = server.attribute(picture(), labels=["car", "cat", "dog"])
    for found, expected in zip(one["predictions"], other["predictions"], strict=True):
        assert found["label"] == expected["label"]
        assert found["probability"] == pytest.approx(expected["probability"], abs=1e-6)


def test_whitespace_around_labels_is_taken_off_everywhere(server, picture):
    plain = {"labels": ["cat", "dog"], "explain": {"targets": ["dog"], "contrast": "cat"}}
    spaced = {"labels": ["  cat ", "\tdog\n"], "explain": {"targets": [" dog"], "contrast": "cat  "}}
    assert without_timings(server.attribute(picture(), **spaced)) == without_timings(
        server.attribute(picture(), **plain)
    )


@pytest.mark.parametrize(
    "labels",
    [
        ["a\0b", "c"],
        ["猫", "собака", "🐈", "e\u0301"],
        ["<|startoftext|>", "<|endoftext|>"],
        ["x" * 256, "y"],
        ["{}", "{0}", "%s"],
        ["\u202ecat", "!!!"],
        [f"label {i}" for i in range(2048)],
    ],
    ids=["null byte", "scripts", "special tokens", "longest", "braces", "unprintable", "most"],
)
def test_unusual_labels_are_answered(server, picture, labels):
    answer = server.attribute(picture(), labels=labels, top_k=3000)
    assert sorted(prediction["label"] for prediction in answer["predictions"]) == sorted(labels)
    assert all(math.isfinite(prediction["logit"]) for prediction in answer["predictions"])


def test_classify_is_attribute_without_the_account(server, picture):
    asked = {"labels": ["cat", "dog", "car"], "templates": ["this is a {}"], "top_k": 2}
    full = server.attribute(picture(), **asked)
    for response in (
        server.post("/v1/classify", picture(), asked),
        as_json(server, "/v1/classify", picture(), **asked),
    ):
        assert response.status_code == 200
        answer = response.json()
        assert set(answer) == {"request_id", "model", "predictions", "timings_ms"}
        assert (answer["model"], answer["predictions"]) == (full["model"], full["predictions"])


def test_many_at_once_get_their_own_answers(server, picture):
    images = [picture(seed=seed) for seed in range(12)]
    alone = [server.attribute(image)["explanations"] for image in images]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda image: server.attribute(image)["explanations"], images * 3))
    for found, expected in zip(together, alone * 3, strict=True):
        assert found[0]["target"] == expected[0]["target"]
        assert found[0]["logit"] == pytest.approx(expected[0]["logit"], abs=1e-4)
        assert found[0]["ledger"]["clt"] == pytest.approx(expected[0]["ledger"]["clt"], abs=1e-4)


def test_model_is_the_bundle_that_is_served(server, bundle, picture):
    response = server.http.get("/v1/model")
    assert response.status_code == 200
    answer = response.json()
    assert set(answer) == {"name", "digest", "provider", "manifest"}
    assert answer["digest"] == bundle.digest
    assert answer["provider"] == "CPUExecutionProvider"
    assert answer["manifest"] == json.loads((bundle.path / "manifest.json").read_text())
    assert server.attribute(picture())["model"] == {"name": answer["name"], "digest": answer["digest"]}


# Probes, metrics, the OpenAPI document


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes(server, path):
    assert server.http.get(path).status_code == 200


def metrics(server):
    """(name, labels) -> value of every sample at /metrics."""
    response = server.http.get("/metrics")
    assert response.status_code == 200
    families = text_string_to_metric_families(response.text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_requests_stages_and_fidelity(server, picture, bundle):
    def value(series, **labels):
        return metrics(server).get((series, frozenset(labels.items())), 0)

    answered = value("vitrine_requests_total", endpoint="/v1/attribute", status="200")
    refused = value("vitrine_requests_total", endpoint="/v1/attribute", status="415")
    server.attribute(picture())
    server.post("/v1/attribute", b"no image")
    assert value("vitrine_requests_total", endpoint="/v1/attribute", status="200") == answered + 1
    assert value("vitrine_requests_total", endpoint="/v1/attribute", status="415") == refused + 1
    assert value("vitrine_request_seconds_count", endpoint="/v1/attribute") >= answered + refused + 2
    for stage in ("decode", "labels", "queue", "inference", "ledger"):
        assert value("vitrine_stage_seconds_count", stage=stage) >= 1
    assert value("vitrine_fidelity_r2_count") >= answered + 1
    assert value("vitrine_error_share_count") >= answered + 1
    info = {"name": bundle.manifest.name, "digest": bundle.digest, "provider": "CPUExecutionProvider"}
    assert value("vitrine_bundle_info", **info) == 1


def test_junk_paths_and_methods_make_no_time_series(server):
    server.http.get("/junk/warm-up")
    before = set(metrics(server))
    for index in range(3):
        server.http.get(f"/junk/{index}")
        server.http.post(f"/v1/attribute/{index}")
        server.http.request("OPTIONS", f"/livez/{index}")
    new = {(name, tuple(labels)) for name, labels in set(metrics(server)) - before}
    assert not [series for series in new if re.search(r"/\d", str(series))]


@pytest.fixture(scope="module")
def openapi(server):
    response = server.http.get("/openapi.json")
    assert response.status_code == 200
    return response.json()


def test_openapi_is_a_sound_document_of_the_three_routes(openapi):
    assert openapi["openapi"].startswith("3.")
    assert openapi["info"]["title"] == "Vitrine"
    assert openapi["info"]["version"]
    assert {path: set(item) for path, item in openapi["paths"].items()} == {
        "/v1/attribute": {"post"},
        "/v1/classify": {"post"},
        "/v1/model": {"get"},
    }
    operations = [operation for item in openapi["paths"].values() for operation in item.values()]
    assert len({operation["operationId"] for operation in operations}) == 3
    for operation in operations:
        assert all(response["description"] for response in operation["responses"].values())
        assert operation["responses"]["200"]["content"]["application/json"]["schema"]


def test_openapi_references_exist(openapi):
    schemas = openapi["components"]["schemas"]
    references = re.findall(r'"\$ref": "([^"]*)"', json.dumps(openapi))
    assert references
    assert all(reference.removeprefix("#/components/schemas/") in schemas for reference in references)


@pytest.mark.parametrize(("path", "has_explain"), [("/v1/attribute", True), ("/v1/classify", False)])
def test_openapi_describes_both_ways_of_asking(openapi, path, has_explain):
    body = openapi["paths"][path]["post"]["requestBody"]
    assert body["required"]
    fields = {"labels", "label_set", "templates", "top_k"} | ({"explain"} if has_explain else set())
    multipart = body["content"]["multipart/form-data"]["schema"]
    assert multipart["required"] == ["image"]
    assert set(multipart["properties"]["request"]["properties"]) == fields
    plain = body["content"]["application/json"]["schema"]
    assert set(plain["properties"]) == fields | {"image_base64"}
    assert plain["required"] == ["image_base64"]


def test_openapi_describes_the_answer_that_is_given(server, picture, openapi):
    schemas = openapi["components"]["schemas"]

    def check(value, schema):
        schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        if schema.get("type") == "object" and "properties" in schema:
            assert set(value) == set(schema["properties"])
            for key, part in schema["properties"].items():
                check(value[key], part)
        elif schema.get("type") == "array":
            for element in value:
                check(element, schema["items"])

    asked = {"explain": {"targets": LABELS}}
    for path in ("/v1/attribute", "/v1/classify"):
        responses = openapi["paths"][path]["post"]["responses"]
        answer = server.post(path, picture(), asked if path == "/v1/attribute" else None).json()
        check(answer, responses["200"]["content"]["application/json"]["schema"])
        refusal = server.post(path, b"no image")
        check(refusal.json(), responses[str(refusal.status_code)]["content"]["application/json"]["schema"])


# Request ids


@pytest.mark.parametrize("request_id", ["abc-123", "A.b_c:d-9", "x" * 128])
def test_request_id_is_taken_over(server, picture, request_id):
    response = server.post("/v1/attribute", picture(), **{"X-Request-ID": request_id})
    assert response.headers["x-request-id"] == response.json()["request_id"] == request_id


@pytest.mark.parametrize("request_id", [None, "", "a b", "x" * 129, "a\tb", "ü", '"><script>'])
def test_missing_or_invalid_request_id_is_replaced(server, picture, request_id):
    headers = {} if request_id is None else {"X-Request-ID": request_id.encode()}
    response = server.post("/v1/attribute", picture(), **headers)
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    assert response.json()["request_id"] == response.headers["x-request-id"]


def test_request_ids_differ(server, picture):
    assert server.attribute(picture())["request_id"] != server.attribute(picture())["request_id"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/model"), ("GET", "/v1/attribute"), ("POST", "/v1/attribute"), ("GET", "/nowhere")]
)
def test_request_id_is_echoed_whatever_the_answer(server, method, path):
    response = server.http.request(method, path, headers={"X-Request-ID": "mine"})
    assert response.headers.get_list("x-request-id") == ["mine"]
    if response.is_error:
        assert response.json()["error"]["request_id"] == "mine"


# Errors


@pytest.fixture
def refused(server, picture):
    """refused(response, status, code): it is, in the envelope, and a normal request afterwards is answered."""

    def check(response, status, code):
        assert response.status_code == status, response.text[:500]
        assert response.headers["content-type"] == "application/json"
        assert list(response.json()) == ["error"]
        error = response.json()["error"]
        assert set(error) == {"code", "message", "details", "request_id"}
        assert error["code"] == code
        assert error["message"]
        assert isinstance(error["details"], list)
        assert error["request_id"] == response.headers["x-request-id"]
        assert "Traceback" not in response.text
        assert len(response.content) < 100_000, "a small mistake must not be answered at length"
        assert server.attribute(picture())["predictions"]
        return error

    return check


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
    "tiff": (lambda picture: picture("TIFF"), 415, "unsupported_image"),
    "ico": (lambda picture: picture("ICO"), 415, "unsupported_image"),
    "ppm": (lambda picture: picture("PPM"), 415, "unsupported_image"),
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
    post = server.post if send == "multipart" else lambda path, image: as_json(server, path, image)
    refused(post("/v1/attribute", make(picture)), status, code)


def test_empty_image_is_refused(server, refused):
    refused(server.post("/v1/attribute", b""), 400, "invalid_image")
    refused(as_json(server, "/v1/attribute", b""), 400, "invalid_request")


def test_classify_refuses_alike(server, refused):
    refused(server.post("/v1/classify", b"no image"), 415, "unsupported_image")
    refused(as_json(server, "/v1/classify", b"no image"), 415, "unsupported_image")


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "image/png", "application/x-www-form-urlencoded"])
def test_other_content_types_are_refused(server, picture, refused, content_type):
    headers = {} if content_type is None else {"content-type": content_type}
    refused(server.http.post("/v1/attribute", content=picture(), headers=headers), 415, "unsupported_media_type")


def test_missing_image_is_refused(server, refused):
    refused(server.post("/v1/attribute", request={"top_k": 1}), 400, "missing_image")
    refused(server.http.post("/v1/attribute", json={"top_k": 1}), 400, "missing_image")
    refused(server.http.post("/v1/attribute", json={}), 400, "missing_image")


@pytest.fixture
def bait():
    """A listening socket: (its URL, whether anyone came)."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)

        def came():
            try:
                listening.accept()[0].close()
            except BlockingIOError:
                return False
            return True

        yield f"http://127.0.0.1:{listening.getsockname()[1]}/cat.png", came


def test_no_url_is_fetched(server, refused, bait):
    url, came = bait
    refused(server.http.post("/v1/attribute", files={"image": (None, url)}), 400, "missing_image")
    refused(server.http.post("/v1/attribute", files={"image": (None, "")}), 400, "missing_image")
    refused(server.post("/v1/attribute", url.encode()), 415, "unsupported_image")
    refused(server.http.post("/v1/attribute", json={"image_base64": url}), 400, "invalid_image")
    response = server.http.post("/v1/attribute", json={"image": url})
    refused(response, 400, response.json()["error"]["code"])
    refused(server.http.post("/v1/attribute", data={"image": url}), 415, "unsupported_media_type")
    assert not came()


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


@pytest.mark.parametrize("case", set(BAD_JSON) - {"empty"})
def test_bad_json_part_is_refused(server, picture, refused, case):
    refused(server.post("/v1/attribute", picture(), BAD_JSON[case]), 400, "invalid_request")


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_body_is_refused(server, refused, case):
    refused(post_raw_json(server, BAD_JSON[case]), 400, "invalid_request")


@pytest.mark.parametrize("body", [b"\xff\xfe{", b"\x80", b'{"labels": ["\xed\xa0\x80"]}'])
def test_bytes_that_are_no_text_are_refused(server, picture, refused, body):
    response = server.http.post("/v1/attribute", files={"image": ("a", picture()), "request": ("r", body)})
    refused(response, 400, "invalid_request")
    response = post_raw_json(server, body.replace(b"{", b'{"image_base64": "AAAA", ', 1))
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
    "heatmap": ({"explain": {"heatmap": True}}, "explain.heatmap"),
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
    refused(as_json(server, "/v1/attribute", picture(), **request), 400, code)


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
    "text", ["not base64!", "ab", "data:image/png;base64,iVBORw0KGgo=", "\u00e9\u00e9\u00e9\u00e9"]
)
def test_bad_base64_is_refused(server, refused, text):
    refused(server.http.post("/v1/attribute", json={"image_base64": text}), 400, "invalid_image")


@pytest.mark.parametrize("image", [1, None, ["a"], {"url": "x"}, "\ud800"])
def test_image_of_the_wrong_type_is_refused(server, refused, image):
    text = json.dumps({"image_base64": image})
    refused(post_raw_json(server, text), 400, "invalid_request")


def multipart_body(*parts):
    """Parts (disposition, bytes) as a multipart body with the boundary `b`."""
    lines = [
        b"--b\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + body + b"\r\n"
        for disposition, body in parts
    ]
    return b"".join(lines) + b"--b--\r\n"


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
    ],
)
def test_wrong_method_is_refused_with_the_right_one(server, refused, method, path, allowed):
    response = server.http.request(method, path)
    refused(response, 405, "method_not_allowed")
    assert allowed in response.headers["allow"].split(", ")


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/", "/nowhere", "/v1", "/v1/attribute/", "/v1/model/x", "/v2/attribute", "/v1/%00"])
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


# What a healthy server does not show: the same app in this process, its engine held up


def talk_to(app, conversation, ready=True):
    """What `conversation(client)` returns, spoken to `app` after (or before) it has loaded its bundle."""

    async def talk():
        transport, headers = httpx.ASGITransport(app, raise_app_exceptions=False), {"X-Request-ID": "mine"}
        async with AsyncExitStack() as stack:
            if ready:
                await stack.enter_async_context(app.router.lifespan_context(app))
            return await conversation(
                await stack.enter_async_context(
                    httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)
                )
            )

    return asyncio.run(talk())


def error_of(response):
    error = response.json()["error"]
    assert response.headers["x-request-id"] == error["request_id"] == "mine"
    return response.status_code, error["code"]


@pytest.fixture
def gate(monkeypatch):
    """An event that every inference waits for; set until a test clears it."""
    explain, gate = Engine.explain, threading.Event()
    gate.set()
    monkeypatch.setattr(Engine, "explain", lambda self, pixels: gate.wait(30) and explain(self, pixels))
    yield gate
    gate.set()


def test_a_full_queue_is_said_at_once(bundle_path, picture, gate):
    app = create_app(Settings(bundle=bundle_path, queue_size=1, batch_size=1))

    async def conversation(client):
        gate.clear()
        batcher, answered = app.state.attributor.batcher, []
        for waiting in (0, 1):  # the first runs, the second waits
            answered.append(asyncio.create_task(client.post("/v1/attribute", files={"image": picture()})))
            while metric("vitrine_stage_seconds_count", stage="labels") < before + 1 + waiting:
                await asyncio.sleep(0.01)
            while batcher.waiting != waiting:
                await asyncio.sleep(0.01)
        refused = await client.post("/v1/attribute", files={"image": picture()})
        gate.set()
        return [*await asyncio.gather(*answered), refused]

    def metric(name, **labels):
        return REGISTRY.get_sample_value(name, labels) or 0

    before = metric("vitrine_stage_seconds_count", stage="labels")
    *answered, refused = talk_to(app, conversation)
    assert [response.status_code for response in answered] == [200, 200]
    assert error_of(refused) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": [1] * 50_000},
        {"templates": ["a"] * 50_000},
        {"explain": {"targets": [1] * 50_000}},
        {f"field {i}": 1 for i in range(50_000)},
    ],
    ids=["labels", "templates", "targets", "unknown fields"],
)
def test_many_mistakes_take_no_memory(bundle_path, fields):
    """16 MiB hold 8 million of them: told one by one they would take gigabytes, and the event loop for a minute."""

    async def conversation(client):
        body = json.dumps({"image_base64": "AAAA", **fields})
        tracemalloc.start()
        response = await client.post("/v1/attribute", content=body, headers={"content-type": "application/json"})
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return response, peak

    response, peak = talk_to(create_app(Settings(bundle=bundle_path)), conversation)
    assert error_of(response) == (400, "invalid_request")
    assert peak < 20 * 2**20


@pytest.mark.parametrize("path", ["/v1/attribute", "/v1/classify"])
def test_the_deadline_is_kept(bundle_path, picture, gate, path):
    async def conversation(client):
        gate.clear()
        response = await client.post(path, files={"image": picture()})
        gate.set()
        return response

    response = talk_to(create_app(Settings(bundle=bundle_path, deadline_seconds=0.1)), conversation)
    assert error_of(response) == (504, "deadline_exceeded")


def test_the_deadline_covers_a_slow_upload(bundle_path):
    async def conversation(client):
        async def slow():
            for _ in range(500):
                yield b" "
                await asyncio.sleep(0.01)

        return await client.post("/v1/attribute", content=slow(), headers={"content-type": "application/json"})

    response = talk_to(create_app(Settings(bundle=bundle_path, deadline_seconds=0.1)), conversation)
    assert error_of(response) == (504, "deadline_exceeded")


def test_an_unforeseen_error_is_logged_under_its_request_id_and_not_told(bundle_path, picture, monkeypatch, caplog):
    async def fail(*_):
        raise RuntimeError("a secret")

    monkeypatch.setattr(Attributor, "attribute", fail)
    app = create_app(Settings(bundle=bundle_path))
    response = talk_to(app, lambda client: client.post("/v1/attribute", files={"image": picture()}))
    assert error_of(response) == (500, "internal")
    assert "secret" not in response.text
    assert any("mine" in record.getMessage() and record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/attribute"), ("POST", "/v1/classify"), ("GET", "/v1/model")]
)
def test_before_the_bundle_is_loaded_nothing_but_that_is_said(bundle_path, method, path):
    app = create_app(Settings(bundle=bundle_path))
    response = talk_to(app, lambda client: client.request(method, path), ready=False)
    assert error_of(response) == (503, "not_ready")


def test_a_bundle_with_an_unfitting_table_stops_the_start(bundle_path, tmp_path):
    """And not the first request that needs it, when /readyz has long said that all is well."""
    path = shutil.copytree(bundle_path, tmp_path / "bundle")
    manifest = json.loads((path / "manifest.json").read_text())
    np.save(path / "fold.npy", np.load(path / "fold.npy")[:-1])
    (path / "manifest.json").unlink()
    seal(path, Manifest.model_validate(manifest))
    with pytest.raises(BundleError, match=r"fold\.npy"):
        talk_to(create_app(Settings(bundle=path)), lambda client: client.get("/v1/model"))
