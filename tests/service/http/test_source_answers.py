"""Source accounts in answers, through a real server process."""

import json

import numpy as np
import pytest

LABELS = ["red circle", "green square", "blue triangle"]  # the tiny bundle's
LAYERS, PATCHES, EVERYTHING = 3, 16, 100_000


def ask(server, image, **explain):
    """The source accounts of an answer."""
    answer = server.attribute(image, explain={"sources": True, **explain})
    return [explanation["sources"] for explanation in answer["explanations"]]


def rows(account):
    for layer in account["layers"]:
        yield from (layer[name] or 0.0 for name in ("features", "error", "bias", "baseline", "silent"))


def total(account):
    return sum(rows(account)) + sum(account["embedding"]) + account["constants"] + account["remainder"]


@pytest.mark.parametrize("baseline", ["zero", "mean"])
@pytest.mark.parametrize("contrast", [None, "red circle"])
def test_all_of_it_sums_to_the_logit(server, picture, baseline, contrast):
    targets = LABELS[1:] if contrast else LABELS
    answer = server.attribute(
        picture(), explain={"sources": True, "targets": targets, "contrast": contrast, "baseline": baseline}
    )
    assert [explanation["target"] for explanation in answer["explanations"]] == targets
    assert "sources" in answer["timings_ms"]
    for explanation in answer["explanations"]:
        account = explanation["sources"]
        assert account["logit"] == pytest.approx(explanation["logit"], abs=1e-3)
        assert total(account) == pytest.approx(account["logit"], abs=1e-6)
        assert abs(account["remainder"]) <= 1e-3
        assert 0 <= account["error_share"] <= 1
        assert all((layer["baseline"] is None) == (baseline == "zero") for layer in account["layers"])


def test_listed_features_are_the_largest_and_make_up_their_layers(server, picture):
    (account,) = ask(server, picture(), source_features=EVERYTHING)
    found = account["features"]
    sizes = [abs(feature["contribution"]) for feature in found]
    assert sizes == sorted(sizes, reverse=True)
    assert len({(feature["layer"], feature["index"]) for feature in found}) == len(found) > 20
    for layer in account["layers"]:
        listed = sum(feature["contribution"] for feature in found if feature["layer"] == layer["layer"])
        assert listed == pytest.approx(layer["features"], abs=1e-4)
    (few,) = ask(server, picture(), source_features=3)
    assert few["features"] == found[:3]
    assert ask(server, picture(), source_features=0)[0]["features"] == []


def test_tokens_add_up_to_features_and_to_the_map(server, picture):
    (account,) = ask(server, picture(), source_features=EVERYTHING)
    assert account["rows"] * account["columns"] == PATCHES
    for feature in account["features"]:
        assert len(feature["tokens"]) == PATCHES + 1
        assert sum(feature["tokens"]) == pytest.approx(feature["contribution"], abs=1e-5)
        assert feature["activation"] != 0
    tokens = np.sum([feature["tokens"] for feature in account["features"]], axis=0)
    errors = np.array(account["map"]) - tokens - account["embedding"]
    assert errors.sum() == pytest.approx(sum(layer["error"] for layer in account["layers"]), abs=1e-4)
    assert len(account["map"]) == len(account["embedding"]) == PATCHES + 1


def test_a_baseline_moves_what_is_common_to_all_pictures_into_rows_of_its_own(server, picture):
    (zero,), (mean,) = (
        ask(server, picture(), source_features=EVERYTHING, baseline=baseline) for baseline in ("zero", "mean")
    )
    assert mean["embedding"] == pytest.approx(zero["embedding"], abs=1e-5)
    for without, about in zip(zero["layers"], mean["layers"], strict=True):
        assert about["error"] == pytest.approx(without["error"], abs=1e-5)
        moved = about["features"] + about["baseline"] + about["silent"]
        assert moved == pytest.approx(without["features"], abs=1e-4)
    assert any(abs(layer["baseline"]) > 1e-3 for layer in mean["layers"])
    assert any(abs(layer["silent"]) > 1e-3 for layer in mean["layers"])


def test_who_does_not_ask_gets_none(server, picture):
    answer = server.attribute(picture())
    assert answer["explanations"][0]["sources"] is None
    assert "sources" not in answer["timings_ms"]


def test_features_have_the_labels_of_their_cards(server, picture):
    (account,) = ask(server, picture(), source_features=EVERYTHING)
    labelled = [feature for feature in account["features"] if feature["label"]]
    assert labelled
    for feature in labelled[:5]:
        card = server.http.get(f"/v1/features/{feature['layer']}/{feature['index']}").json()
        assert (card["label"], card["label_score"]) == (feature["label"], feature["label_score"])


def test_a_batch_has_each_images_own(server, picture):
    pictures = [picture(seed=seed) for seed in range(3)]
    request = {"explain": {"sources": True, "source_features": 4}}
    files = [("image", (f"{n}.png", data)) for n, data in enumerate(pictures)]
    files.append(("request", (None, json.dumps(request))))
    answer = server.http.post("/v1/attribute:batch", files=files)
    assert answer.status_code == 200
    for data, result in zip(pictures, answer.json()["results"], strict=True):
        (explanation,) = result["answer"]["explanations"]
        (alone,) = ask(server, data, source_features=4)
        assert [(f["layer"], f["index"]) for f in explanation["sources"]["features"]] == [
            (f["layer"], f["index"]) for f in alone["features"]
        ]
        assert explanation["sources"]["logit"] == pytest.approx(alone["logit"], abs=1e-4)


@pytest.mark.parametrize(
    ("explain", "said"),
    [
        ({"baseline": "mean"}, "set both"),
        ({"sources": True, "source_features": -1}, "source_features"),
        ({"sources": True, "baseline": "median"}, "baseline"),
    ],
)
def test_what_cannot_be_asked(server, picture, explain, said):
    response = server.post_json("/v1/attribute", picture(), explain=explain)
    assert response.status_code == 400
    assert said in response.text


def test_the_error_share_is_a_metric(server, picture):
    def count():
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vitrine_source_error_share_count"))

    before = count()
    ask(server, picture(), targets=LABELS)
    server.attribute(picture())
    assert count() == before + 1
