"""Cosines, and probabilities of each label for itself, with a verdict of none of these."""

import json
import math

import numpy as np
import pytest

LABELS = ["red circle", "green square", "blue triangle"]  # the tiny bundle's


@pytest.fixture
def plain(server, picture):
    """The predictions by the softmax."""
    return server.attribute(picture())["predictions"]


def test_cosines_are_those_of_the_embeddings(server, picture, bundle, plain):
    text = bundle.manifest.text
    both = server.post(
        "/v1/embed", picture(), {"texts": [t.replace("{}", name) for name in LABELS for t in text.templates]}
    )
    image, texts = np.array(both.json()["embedding"]), np.array(both.json()["text_embeddings"])
    means = texts.reshape(len(LABELS), len(text.templates), -1).mean(1)
    expected = dict(zip(LABELS, (means / np.linalg.norm(means, axis=1, keepdims=True)) @ image, strict=True))
    for prediction in plain:
        assert prediction["cosine"] == pytest.approx(expected[prediction["label"]], abs=1e-5)
        assert prediction["logit"] == pytest.approx(prediction["cosine"] * bundle.manifest.logit_scale)


def independent(server, picture, threshold, path="/v1/attribute", **more):
    response = server.post(path, picture(), {"scoring": "independent", "threshold": threshold, **more})
    assert response.status_code == 200, response.text
    return response.json()


def test_none_of_these_is_told_from_the_forced_choice(server, picture, plain):
    first = plain[0]
    for path in ("/v1/attribute", "/v1/classify"):
        none = independent(server, picture, math.nextafter(first["cosine"], 1), path)
        assert none["verdict"]["none_of_these"] is True
        assert none["verdict"]["above"] == []
        forced = {"label": first["label"], "probability": pytest.approx(first["probability"])}
        assert none["verdict"]["softmax"] == forced
        assert all(prediction["probability"] < 0.5 for prediction in none["predictions"])
        one = independent(server, picture, first["cosine"], path)
        assert one["verdict"]["above"] == [first["label"]]
        assert one["verdict"]["none_of_these"] is False
        assert one["predictions"][0]["probability"] == 0.5


def test_each_label_has_its_own_threshold_and_no_other_label_matters(server, picture, bundle, plain):
    scale = bundle.manifest.logit_scale
    wanted = {plain[0]["label"]: 0.03, plain[1]["label"]: 0.02, plain[2]["label"]: -0.01}  # how far below its threshold
    threshold = {p["label"]: p["cosine"] + wanted[p["label"]] for p in plain}
    answer = independent(server, picture, threshold, top_k=2)
    assert [p["label"] for p in answer["predictions"]] == [plain[2]["label"], plain[1]["label"]]
    assert answer["verdict"]["above"] == [plain[2]["label"]]
    for prediction in answer["predictions"]:
        score = 1 / (1 + math.exp(scale * wanted[prediction["label"]]))
        assert prediction["probability"] == pytest.approx(score, rel=1e-6)
    assert answer["explanations"][0]["target"] == plain[2]["label"]
    label = plain[2]["label"]
    alone = independent(server, picture, {f" {label} ": threshold[label]}, labels=[label])
    (one,) = alone["predictions"]
    assert one.pop("label") == answer["predictions"][0].pop("label")
    assert one == pytest.approx(answer["predictions"][0], abs=1e-4)


def test_effects_are_of_the_probability_that_is_told(server, picture, bundle, plain):
    """The softmax of one label is certain, whatever is dropped; by its threshold a label can lose and gain."""
    label = plain[0]["label"]
    softmax = server.attribute(picture(), labels=[label])
    assert {layer["drop_effect"] for layer in softmax["explanations"][0]["layers"]} == {0}
    at_threshold = independent(server, picture, softmax["predictions"][0]["cosine"], labels=[label])
    effects = [layer["drop_effect"] for layer in at_threshold["explanations"][0]["layers"]]
    assert all(-0.5 <= effect <= 0.5 for effect in effects)
    assert any(effects)


def test_a_batch_has_a_verdict_for_each_image(server, picture):
    images = [picture(seed=seed) for seed in range(3)]
    cosines = [server.attribute(image, labels=["cat"])["predictions"][0]["cosine"] for image in images]
    middle = sorted(cosines)[1]
    files = [("image", ("a", image)) for image in images]
    request = {"labels": ["cat"], "scoring": "independent", "threshold": middle}
    files.append(("request", (None, json.dumps(request))))
    results = server.http.post("/v1/attribute:batch", files=files).json()["results"]
    verdicts = [result["answer"]["verdict"]["none_of_these"] for result in results]
    assert verdicts == [cosine < middle for cosine in cosines]


@pytest.mark.parametrize(
    ("request_part", "says"),
    [
        ({"scoring": "independent"}, "requires `threshold`"),
        ({"threshold": 0.2}, "can only be used with `scoring` independent"),
        ({"scoring": "sigmoid", "threshold": 0.2}, "scoring: "),
        ({"scoring": "independent", "threshold": 1.1}, "threshold"),
        ({"scoring": "independent", "threshold": "0.2"}, "threshold"),
        ({"scoring": "independent", "threshold": True}, "threshold"),
        ({"scoring": "independent", "threshold": math.nan}, "threshold"),
        ({"scoring": "independent", "threshold": {"cat": None}}, "threshold"),
        (
            {"scoring": "independent", "threshold": {LABELS[0]: 0.2}},
            f"`threshold` is missing for {LABELS[1]!r}, {LABELS[2]!r}",
        ),
        ({"scoring": "independent", "threshold": dict.fromkeys([*LABELS, "cat"], 0.2)}, "not among the labels: 'cat'"),
        (
            {"scoring": "independent", "threshold": {"cat": 0.2}, "labels": ["cat", "dog"]},
            "`threshold` is missing for 'dog'",
        ),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(server, picture, refused, request_part, says):
    for path in ("/v1/attribute", "/v1/classify"):
        refusal = refused(server.post(path, picture(), request_part), 400, "invalid_request")
        assert says in refusal["message"]


def test_the_lens_is_of_the_softmax(server, picture, refused):
    request = {"scoring": "independent", "threshold": 0.2, "explain": {"lens": True}}
    assert (
        "explain.lens" in refused(server.post("/v1/attribute", picture(), request), 400, "invalid_request")["message"]
    )


def test_it_may_stand_in_the_query(server, picture):
    response = server.http.post(
        "/v1/classify?scoring=independent&threshold=-1", content=picture(), headers={"content-type": "image/png"}
    )
    assert len(response.json()["verdict"]["above"]) == 3
