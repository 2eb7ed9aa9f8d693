"""An image that fits its best label worse than the bundle's own images fit theirs: every answer says it."""

import base64
import json
import shutil
from types import SimpleNamespace

import pytest

from vitrine.models.bundle.manifest import FIT_IMAGES, LabelFit
from vitrine.models.bundle.sealing import seal
from vitrine.service.answers.notices import UNLIKE, unlike_labels

LABELS = ["cat", "dog"]
SPLIT = {"labels": LABELS}


@pytest.fixture(scope="module")
def demanding(bundle, start_server, tmp_path_factory):
    """A server on the tiny bundle, whose own images are said to have had cosines of nearly 1."""
    path = shutil.copytree(bundle.path, tmp_path_factory.mktemp("demanding") / "tiny")
    text = bundle.manifest.text.model_copy(update={"fit": LabelFit(images=200, low_cosine=0.99)})
    seal(path, bundle.manifest.model_copy(update={"text": text}))
    with start_server(VITRINE_BUNDLE=path) as server:
        yield server


def codes(answer):
    return [warning["code"] for warning in answer["warnings"]]


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/attribute"])
def test_an_answer_says_it_of_its_image(demanding, server, picture, path):
    (warning,) = (answer := demanding.post(path, picture(), SPLIT).json())["warnings"]
    best = answer["predictions"][0]["cosine"]
    assert warning == {
        "code": UNLIKE,
        "message": f"Perhaps none of the labels fits this image: the best one has a cosine of {best:.2f}. With the "
        "bundle's own labels, 99% of 200 images have at least 0.99.",
        "labels": None,
    }
    assert codes(demanding.post(path, picture(), {"labels": ["Cat", "cat"]}).json()) == ["labels_same", UNLIKE]
    own_verdict = SPLIT | {"scoring": "independent", "threshold": 0.2}
    assert codes(demanding.post(path, picture(), own_verdict).json()) == []
    assert codes(server.post(path, picture(), SPLIT).json()) == []  # where nothing was measured


def test_so_do_batches_interventions_and_the_other_protocols(demanding, picture):
    (result,) = demanding.post("/v1/attribute:batch", picture(), SPLIT).json()["results"]
    assert codes(result["answer"]) == [UNLIKE]
    edits = {"edits": [{"op": "ablate", "row": "attention", "layer": 0}]}
    assert codes(demanding.post("/v1/intervene", picture(), SPLIT | edits).json()) == [UNLIKE]
    image = base64.b64encode(picture()).decode()
    for verb, name in (("predict", "predictions"), ("explain", "explanations")):
        asked = {"instances": [{"image": {"b64": image}}], "parameters": SPLIT}
        response = demanding.http.post(f"/v1/models/tiny:{verb}", json=asked)
        assert response.status_code == 200, response.text
        (one,) = response.json()[name]
        assert codes(one) == [UNLIKE]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [image]}
    infer = demanding.http.post("/v2/models/tiny/infer", json={"inputs": [tensor]}).json()
    (note,) = json.loads(infer["parameters"]["notes"])
    assert codes(note) == [UNLIKE]


@pytest.mark.parametrize(("cosines", "is_said"), [([0.3, 0.1], False), ([0.2, 0.1], False), ([0.19, 0.1], True)])
def test_the_best_label_decides(cosines, is_said):
    predictions = [SimpleNamespace(cosine=cosine) for cosine in cosines]
    fit = LabelFit(images=FIT_IMAGES, low_cosine=0.2)
    assert [note.code for note in unlike_labels(fit, predictions)] == [UNLIKE] * is_said
    assert unlike_labels(None, predictions) == ()


def test_a_cosine_just_below_0_has_no_sign():
    (note,) = unlike_labels(LabelFit(images=FIT_IMAGES, low_cosine=0.2), [SimpleNamespace(cosine=-0.001)])
    assert "a cosine of 0.00." in note.message
