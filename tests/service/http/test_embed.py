"""/v1/embed and /v1/labels."""

import base64
import json

import numpy as np
import pytest


def test_an_image_and_texts_are_embedded_as_the_engine_does(server, engine, picture):
    texts = ["a photo of a cat", "x"]
    answer = server.post("/v1/embed", picture(), {"texts": texts}).json()
    embedding, text_embeddings = np.array(answer["embedding"]), np.array(answer["text_embeddings"])
    width = engine.bundle.manifest.shape.embedding
    assert (embedding.shape, text_embeddings.shape) == ((width,), (2, width))
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(text_embeddings, axis=1) == pytest.approx(1, abs=1e-5)
    # /v1/classify answers the same: logits are scaled cosines
    request = {"labels": texts, "templates": ["{}"]}
    predictions = server.post("/v1/classify", picture(), request).json()["predictions"]
    logits = {prediction["label"]: prediction["logit"] for prediction in predictions}
    cosines = engine.bundle.manifest.logit_scale * text_embeddings @ embedding
    assert [logits[text] for text in texts] == pytest.approx(cosines, abs=1e-3)


@pytest.mark.parametrize("as_json", [False, True])
def test_either_may_be_left_out(server, picture, as_json):
    def ask(image, request):
        if not as_json:
            return server.post("/v1/embed", image, request)
        fields = {} if image is None else {"image_base64": base64.b64encode(image).decode()}
        return server.post_text(json.dumps(fields | (request or {})), "/v1/embed")

    only_image, only_text = ask(picture(), None).json(), ask(None, {"texts": ["a"]}).json()
    assert only_image["text_embeddings"] is None
    assert only_image["embedding"]
    assert only_text["embedding"] is None
    assert len(only_text["text_embeddings"]) == 1


@pytest.mark.parametrize(
    ("image", "request_part", "status", "code"),
    [
        (None, {}, 400, "missing_image"),
        (b"", None, 400, "invalid_image"),
        (b"no image", None, 415, "unsupported_image"),
        (None, {"texts": []}, 400, "invalid_request"),
        (None, {"texts": [""]}, 400, "invalid_request"),
        (None, {"texts": ["a" * 1_000]}, 400, "invalid_request"),
        (None, {"texts": ["a"] * 3_000}, 400, "invalid_request"),
        (None, {"labels": ["a"]}, 400, "invalid_request"),
    ],
)
def test_refusals(server, refused, image, request_part, status, code):
    refused(server.post("/v1/embed", image, request_part), status, code)


def test_labels_are_the_sets_that_may_be_named(server, carded):
    answer = server.http.get("/v1/labels").json()
    sets = {label_set["name"]: (label_set["labels"], label_set["templates"]) for label_set in answer["label_sets"]}
    text = carded.manifest.text
    assert sets["default"] == (list(text.labels), list(text.templates))
    assert sets["pets"] == (["cat", "dog"], ["a photo of my {}"])
    assert answer["model"]["digest"] == carded.digest
