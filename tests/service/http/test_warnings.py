"""Answers say what their labels are to this CLIP; a strict request with such labels is refused."""

import json

import pytest
from PIL import Image

LONG = "very " * 30
LABELS = ["Cat", "dog", "cat", f"{LONG}cat", "猫"]
SAID = [("labels_cut", LABELS[3:4]), ("labels_same", ["Cat", "cat"]), ("labels_unknown", ["猫"])]


def said(answer):
    return [(warning["code"], warning["labels"]) for warning in answer["warnings"]]


@pytest.mark.parametrize(
    ("path", "request_part"),
    [
        ("/v1/classify", {"labels": LABELS}),
        ("/v1/attribute", {"labels": LABELS}),
        ("/v1/attribute", {"labels": LABELS, "explain": {"heatmap": True}}),
        ("/v1/attribute:batch", {"labels": LABELS}),
        ("/v1/embed", {"texts": LABELS}),
    ],
)
def test_labels_are_warned_of_or_refused(server, picture, refused, path, request_part):
    field = "texts" if "texts" in request_part else "labels"
    plain, strict = {field: ["dog", "cat"], "strict": True}, request_part | {"strict": True}
    refusal = refused(server.post(path, picture(), strict), 400, "invalid_request")
    details = refusal["details"]
    assert [(detail["code"], detail["labels"]) for detail in details] == SAID
    assert [detail["field"] for detail in details] == [field] * 3
    for _ in range(2):
        answer = server.post(path, picture(), request_part).json()
        assert said(answer) == SAID
        assert [warning["message"] for warning in answer["warnings"]] == [detail["problem"] for detail in details]
    assert refusal["message"] == " ".join(detail["problem"] for detail in details)
    assert server.post(path, picture(), plain).json()["warnings"] == []
    refused(server.post(path, picture(), strict), 400, "invalid_request")  # with labels from the cache


def test_a_batch_says_it_once(server, picture):
    files = [("image", (f"{number}.png", picture(seed=number))) for number in range(2)]
    files += [("image", ("2.png", b"no image")), ("request", (None, json.dumps({"labels": ["Cat", "cat"]})))]
    answer = server.http.post("/v1/attribute:batch", files=files).json()
    assert said(answer) == [("labels_same", ["Cat", "cat"])]
    assert [result["answer"] and result["answer"]["warnings"] for result in answer["results"]] == [[], [], None]


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/attribute", "/v1/embed", "/v1/similar", "/v1/attribute:batch"])
def test_what_was_done_to_an_image_is_said_of_that_image(server, encode, path):
    request = {} if path in ("/v1/embed", "/v1/similar") else {"labels": ["Cat", "cat"]}
    answer = server.post(path, encode(Image.new("RGBA", (50, 40)), "PNG"), request).json()
    of_labels = [("labels_same", ["Cat", "cat"])] if request else []
    of_image = [("image_transparent", None)]
    if path == "/v1/attribute:batch":
        assert said(answer) == of_labels
        assert said(answer["results"][0]["answer"]) == of_image
    else:
        assert said(answer) == [*of_labels, *of_image]


def test_nothing_is_computed_for_a_strict_request_that_is_refused(server, refused):
    request = {"labels": ["Cat", "cat"], "strict": True}
    for path in ("/v1/classify", "/v1/attribute", "/v1/attribute:batch"):
        refused(server.post(path, b"no image", request), 400, "invalid_request")  # and not invalid_image


@pytest.mark.parametrize("path", ["/v1/model", "/v1/labels", "/v1/features", "/v1/features/0/0"])
def test_answers_about_the_bundle_have_warnings_too(server, path):
    assert server.http.get(path).json()["warnings"] == []
