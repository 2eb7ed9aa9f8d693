"""Feature cards, search and retrieval over HTTP."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrine.models.bundle.bundle import Bundle
from vitrine.service.answers import features, similar
from vitrine.service.answers.explain import account
from vitrine.service.engine.labels import LabelEncoder, LabelSet
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.attribute import Explain
from vitrine.service.schemas.features import FeaturesQuery, SimilarRequest


@pytest.fixture(scope="module")
def labelled(carded):
    """(layer, index) of a feature with a label, exemplars and thumbnails."""
    _, (best, *_) = carded.cards.search(None, None, 0, 1)
    return best.layer, best.index


def get(server, path):
    response = server.http.get(path)
    assert response.status_code == 200, response.text
    return response.json()


# Labels in answers


def test_answers_name_features_as_their_cards_do(server, carded, picture):
    answer = server.attribute(picture(), explain={"features": 64})
    named = 0
    for layer in answer["explanations"][0]["layers"]:
        assert layer["features"]
        for feature in layer["features"]:
            assert (feature["label"], feature["label_score"]) == carded.cards.label(layer["layer"], feature["index"])
            named += feature["label"] is not None
    assert named


# Cards


def test_a_card(server, carded, labelled):
    layer, index = labelled
    answer, card = get(server, f"/v1/features/{layer}/{index}"), carded.cards.card(*labelled)
    assert answer["model"]["digest"] == carded.digest
    assert answer["dictionary"] == "clt"
    for name in ("layer", "index", "label", "abstained", "label_score", "label_margin", "label_clarity", "read_at"):
        assert answer[name] == getattr(card, name), name
    assert answer["frequency"] == {"cls": card.frequency_cls, "patches": card.frequency_patches}
    assert list(answer["quantiles"]) == ["0.05", "0.25", "0.5", "0.75", "0.95"]
    assert answer["histogram"]["counts"] == card.histogram
    assert answer["histogram"]["edges"][0] == 0
    assert answer["histogram"]["edges"][-1] == pytest.approx(card.largest)
    assert len(answer["histogram"]["edges"]) == len(card.histogram) + 1
    assert (answer["rows"], answer["columns"]) == (4, 4)
    for shown, exemplar in zip(answer["exemplars"], card.exemplars, strict=True):
        assert shown["activation"] == exemplar.activation
        mask = np.frombuffer(exemplar.mask, np.uint8) / 255 * card.mask_scale
        assert shown["mask"] == pytest.approx(mask, abs=1e-3)
        kind, _, picture = shown["thumbnail"].partition(",")
        assert kind == "data:image/webp;base64"
        assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (32, 32)
    for shown, other in zip(answer["coactive"], card.coactive, strict=True):
        assert shown == {**vars(other), "label": carded.cards.label(other.layer, other.index)[0]}


def test_every_card_is_served(server):
    """Including those of features that never fire, which have no histogram, no exemplars and no label."""
    silent = 0
    for index in range(64):
        answer = get(server, f"/v1/features/0/{index}")
        if not answer["exemplars"]:
            silent += 1
            assert (answer["histogram"], answer["quantiles"], answer["label"]) == (None, {}, None)
            assert answer["abstained"] == "too_few_exemplars"
    assert silent


DIGITS = 4_400 * "9"  # more than Python's int() takes


@pytest.mark.parametrize(
    "place",
    ["3/0", "0/64", "99999999999999999999/0", "-1/0", "x/0", "0/1.5", "0", "0/1/2", "0/٣"]
    + [pytest.param(place, id=f"{place[:3]}...") for place in (f"0/{DIGITS}", f"{DIGITS}/0")],
)
def test_features_that_do_not_exist(server, refused, place):
    refused(server.http.get(f"/v1/features/{place}"), 404, "not_found")


@pytest.mark.parametrize("path", ["/v1/features/0/0?dictionary=residual", "/v1/features?dictionary=residual"])
def test_a_dictionary_that_the_bundle_lacks(server, refused, path):
    error = refused(server.http.get(path), 404, "no_cards")
    assert error["message"] == "the bundle 'tiny' has no residual SAEs"


@pytest.mark.parametrize("query", ["dictionary=sae", "dictionary=", "layer=1"])
def test_cards_that_cannot_be_asked_for(server, refused, query):
    error = refused(server.http.get(f"/v1/features/0/0?{query}"), 400, "invalid_request")
    assert query.partition("=")[0] in error["message"]


# Search


def test_a_search_goes_page_by_page(server, carded):
    path, entries = "/v1/features?limit=7", []
    while path:
        page = get(server, path)
        assert len(page["features"]) == min(7, page["total"] - page["offset"])
        entries += page["features"]
        path = page["next"]
    total, expected = carded.cards.search(None, None, 0, 1000)
    assert page["total"] == total == len(entries)
    assert entries == [vars(line) for line in expected]


def test_a_search_by_label(server, carded, labelled):
    label = carded.cards.label(*labelled)[0]
    page = get(server, f"/v1/features?label={label.upper()}&layer={labelled[0]}&limit=100")
    assert {line["label"] for line in page["features"]} == {label}
    assert {line["layer"] for line in page["features"]} == {labelled[0]}
    assert get(server, "/v1/features?label=no%20such%20thing") | {"model": 0} == {
        "model": 0,
        "dictionary": "clt",
        "total": 0,
        "offset": 0,
        "limit": 20,
        "next": None,
        "features": [],
        "warnings": [],
    }
    beyond = get(server, "/v1/features?offset=1000")
    assert (beyond["features"], beyond["next"]) == ([], None)


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        pytest.param(f"limit={DIGITS}", id="limit=9..."),
        "limit=101",
        "limit=x",
        "offset=-1",
        "layer=-1",
        "label=",
        "labels=cat",
        "label=" + 257 * "a",
        "page=2",
    ],
)
def test_searches_that_cannot_be_made(server, refused, query):
    error = refused(server.http.get(f"/v1/features?{query}"), 400, "invalid_request")
    assert query.partition("=")[0] in error["message"]


# Retrieval


@pytest.fixture(scope="module")
def reference(carded, data_root):
    """(number, name, bytes) of a reference image."""
    name = carded.cards.images([11])[0].name
    return 11, name, Path(data_root / name).read_bytes()


def test_an_image_is_nearest_to_itself_in_every_layer(server, carded, reference):
    answer = server.post("/v1/similar", reference[2]).json()
    assert answer["references"] == 40
    assert [layer["layer"] for layer in answer["layers"]] == [0, 1, 2]
    for layer in answer["layers"]:
        assert len(layer["images"]) == 5
        similarities = [image["similarity"] for image in layer["images"]]
        assert similarities == sorted(similarities, reverse=True)
        assert layer["images"][0]["similarity"] == pytest.approx(1, abs=2e-3)
        nearest = [image["name"] for image in layer["images"] if image["similarity"] > 0.998]
        assert reference[1] in nearest
        assert all(image["thumbnail"].startswith("data:image/webp;base64,") for image in layer["images"])
        assert all(image["name"].split("/")[1] == image["class_name"] for image in layer["images"])
    assert set(answer["timings_ms"]) == {"decode", "queue", "inference", "retrieve"}


def test_similarity_is_that_of_the_engines_codes(server, carded, engine, picture):
    """The same as by dense codes from the engine's answer, for a picture that is not a reference."""
    image = picture(seed=4)
    layers = server.post("/v1/similar", image, {"limit": 40}).json()["layers"]
    listed = server.attribute(image, explain={"features": 64})["explanations"][0]["layers"]
    indices, values = carded.cards.references
    names = [reference.name for reference in carded.cards.images(range(40))]
    for layer in range(3):
        query = np.zeros(64)
        for feature in listed[layer]["features"]:
            query[feature["index"]] = feature["activation"]
        stored = np.zeros((40, 64))
        for number, place in zip(*np.nonzero(values[:, layer]), strict=True):
            stored[number, indices[number, layer, place]] = values[number, layer, place]
        cosines = stored @ query / np.maximum(np.linalg.norm(stored, axis=1) * np.linalg.norm(query), 1e-9)
        similarities = {shown["name"]: shown["similarity"] for shown in layers[layer]["images"]}
        assert len(similarities) == 40
        assert [similarities[name] for name in names] == pytest.approx(cosines, abs=1e-3)


def test_pages_of_similar_images(server, picture):
    whole = server.post("/v1/similar", picture(), {"layers": [2], "limit": 12}).json()["layers"]
    part = server.post("/v1/similar", picture(), {"layers": [2], "limit": 4, "offset": 5}).json()["layers"]
    assert part[0]["images"] == whole[0]["images"][5:9]
    assert server.post("/v1/similar", picture(), {"offset": 40}).json()["layers"][0]["images"] == []
    as_json = server.post_json("/v1/similar", picture(), layers=[2, 0], limit=12).json()["layers"]
    assert [layer["layer"] for layer in as_json] == [2, 0]
    assert as_json[0] == whole[0]


@pytest.mark.parametrize(
    "request_part",
    [
        {"layers": [3]},
        {"layers": [1, 1]},
        {"layers": []},
        {"limit": 51},
        {"limit": 0},
        {"offset": -1},
        {"labels": ["a"]},
    ],
)
def test_retrievals_that_cannot_be_made(server, refused, picture, request_part):
    refused(server.post("/v1/similar", picture(), request_part), 400, "invalid_request")


def test_bad_images_are_refused_as_elsewhere(server, refused):
    refused(server.post("/v1/similar", None, {"limit": 3}), 400, "missing_image")
    refused(server.post("/v1/similar", b"no image"), 415, "unsupported_image")


# Bundles without cards


def test_a_bundle_without_cards_says_so(bundle):
    for call in (
        lambda: features.card(bundle, None, "clt", 0, 0),
        lambda: features.search(bundle, None, FeaturesQuery()),
        lambda: similar._check_request(bundle, SimilarRequest()),
    ):
        with pytest.raises(ServiceError, match="vitrine cards") as caught:
            call()
        assert (caught.value.code, caught.value.status) == ("no_cards", 404)


def test_cards_without_references_say_so(carded, monkeypatch):
    copy = Bundle(carded.path, carded.manifest, carded.digest)
    monkeypatch.setattr(copy.cards, "references", tuple(part[:0] for part in copy.cards.references))
    with pytest.raises(ServiceError, match="no reference images") as caught:
        similar._check_request(copy, SimilarRequest())
    assert caught.value.code == "no_cards"


def test_answers_of_a_bundle_without_cards_have_no_labels(bundle, engine):
    parts = engine.explain(np.zeros((1, 3, 32, 32), np.float32))[0]
    text = bundle.manifest.text
    labels = LabelSet(text.labels, LabelEncoder(engine, 10).encode(text.labels, text.templates))
    explanations, _ = account(parts, labels, bundle, Explain())
    listed = [feature for layer in explanations[0].layers for feature in layer.features]
    assert listed
    assert {(feature.label, feature.label_score) for feature in listed} == {(None, None)}
