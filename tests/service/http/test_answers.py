"""The answers to requests, through a real server process."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

LABELS = ["red circle", "green square", "blue triangle"]  # the tiny bundle's
LAYERS, ACTIVE = 3, 8
EVERYTHING = {"targets": LABELS, "features": ACTIVE}


def ledger_sum(ledger):
    rows = ledger["prior"] + sum(ledger["attention"]) + sum(ledger["clt"]) + ledger["bias"] + ledger["error"]
    return rows + ledger["remainder"]


def without_timings(answer):
    return {key: value for key, value in answer.items() if key not in ("request_id", "timings_ms")}


def test_multipart_and_json_give_the_same_answer(server, picture):
    request = {"labels": ["cat", "dog"], "top_k": 1, "explain": {"targets": ["dog"], "contrast": "cat", "features": 2}}
    multipart = server.attribute(picture(), **request)
    plain = server.post_json("/v1/attribute", picture(), **request)
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
    assert set(answer) == {
        "request_id", "model", "edit", "warnings", "predictions", "verdict", "explanations", "lens", "matrix",
        "attention", "residual", "fidelity", "timings_ms",
    }  # fmt: skip
    assert (
        answer["verdict"]
        is answer["lens"]
        is answer["matrix"]
        is answer["residual"]
        is answer["explanations"][0]["heatmap"]
        is None
    )
    assert set(answer["model"]) == {"name", "digest"}
    assert set(answer["fidelity"]) == {"r2", "cosine", "error_share", "reconstructed_top1_agrees"}
    assert set(answer["timings_ms"]) == {"decode", "labels", "queue", "inference", "ledger"}
    assert all(set(prediction) == {"label", "probability", "logit", "cosine"} for prediction in answer["predictions"])
    (explanation,) = answer["explanations"]
    assert set(explanation) == {"target", "contrast", "logit", "ledger", "layers", "heatmap", "sources"}
    assert explanation["sources"] is None
    assert set(explanation["ledger"]) == {"prior", "attention", "clt", "mlp", "bias", "error", "edit", "remainder"}
    assert len(explanation["ledger"]["mlp"]) == LAYERS
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


def test_named_label_set_is_its_labels_and_templates(server, picture):
    named = server.attribute(picture(), label_set="pets")
    explicit = server.attribute(picture(), labels=["cat", "dog"], templates=["a photo of my {}"])
    assert without_timings(named) == without_timings(explicit)
    other = server.attribute(picture(), label_set="pets", templates=["{}"])
    assert without_timings(other) == without_timings(
        server.attribute(picture(), labels=["cat", "dog"], templates=["{}"])
    )


def test_heat_maps_split_the_attention_rows(server, picture):
    answer = server.attribute(picture(), explain={**EVERYTHING, "heatmap": True})
    for explanation in answer["explanations"]:
        heatmap = explanation["heatmap"]
        assert (heatmap["rows"], heatmap["columns"], len(heatmap["heads"][0])) == (4, 4, 4)
        sums = [sum(layers) for layers in zip(*heatmap["patches"], strict=True)]
        assert heatmap["total"] == pytest.approx(sums, abs=1e-6)  # layers may cancel
        parts = zip(heatmap["patches"], heatmap["heads"], heatmap["class_token"], heatmap["constant"], strict=True)
        for row, (patches, heads, class_token, constant) in zip(explanation["ledger"]["attention"], parts, strict=True):
            assert sum(patches) + class_token + constant == pytest.approx(row, abs=1e-4)
            assert sum(heads) == pytest.approx(sum(patches), abs=1e-4)
    assert answer["lens"] is None


def test_matrix_sums_to_one_and_ends_with_the_projection(server, picture):
    answer = server.attribute(picture(), explain={"matrix": True})
    for matrix in answer["matrix"].values():
        assert len(matrix) == LAYERS
        for target, row in enumerate(matrix):
            assert sum(row) == pytest.approx(1, abs=1e-5)
            assert row[target + 1 :] == [0] * (LAYERS - 1 - target)
    projection = [layer["projection"] for layer in answer["explanations"][0]["layers"]]
    assert answer["matrix"]["cls"][-1] == pytest.approx(projection, abs=0.02)  # stored as bytes here, as float32 there
    assert answer["timings_ms"]["matrix"] > 0


def test_lens_ends_with_the_prediction(server, picture):
    answer = server.attribute(picture(), explain={"lens": True}, top_k=len(LABELS))
    assert [layer["layer"] for layer in answer["lens"]] == list(range(LAYERS))
    last, shares = answer["lens"][-1], [prediction["probability"] for prediction in answer["predictions"]]
    assert (last["label"], last["probability"]) == (answer["predictions"][0]["label"], pytest.approx(shares[0]))
    assert last["entropy"] == pytest.approx(-sum(share * math.log(share) for share in shares))


def test_details_change_nothing_else(server, picture):
    plain = server.attribute(picture(), explain=EVERYTHING)
    detailed = server.attribute(picture(), explain={**EVERYTHING, "heatmap": True, "lens": True, "matrix": True})
    for explanation in detailed["explanations"]:
        assert explanation.pop("heatmap")
    assert detailed.pop("lens")
    assert detailed.pop("matrix")
    for answer in (plain, detailed):
        for name in ("request_id", "timings_ms", "lens", "matrix"):
            answer.pop(name, None)
        for explanation in answer["explanations"]:
            explanation.pop("heatmap", None)
    assert detailed == plain


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
    limited = server.attribute(picture(), explain={"features": count})["explanations"][0]["layers"]
    assert [layer["features"] for layer in limited] == [layer["features"][:count] for layer in everything]


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
    explain = {"targets": others, "contrast": contrast, "features": ACTIVE}
    for explanation in server.attribute(picture(), explain=explain)["explanations"]:
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
    targets = [LABELS[2], LABELS[0]]
    both = server.attribute(picture(), explain={"targets": targets})["explanations"]
    assert [explanation["target"] for explanation in both] == targets
    alone = [server.attribute(picture(), explain={"targets": [target]})["explanations"][0] for target in targets]
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
    nulls = server.post("/v1/attribute", picture(), '{"labels": null, "label_set": null, "templates": null}')
    assert without_timings(nulls.json()) == default


def test_order_of_labels_does_not_matter(server, picture):
    one = server.attribute(picture(), labels=["cat", "dog", "car"])
    other = server.attribute(picture(), labels=["car", "cat", "dog"])
    for prediction, expected in zip(one["predictions"], other["predictions"], strict=True):
        assert prediction["label"] == expected["label"]
        assert prediction["probability"] == pytest.approx(expected["probability"], abs=1e-6)


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
    request = {"labels": ["cat", "dog", "car"], "templates": ["this is a {}"], "top_k": 2}
    full = server.attribute(picture(), **request)
    for response in (
        server.post("/v1/classify", picture(), request),
        server.post_json("/v1/classify", picture(), **request),
    ):
        assert response.status_code == 200
        answer = response.json()
        assert set(answer) == {"request_id", "model", "edit", "warnings", "predictions", "verdict", "timings_ms"}
        assert (answer["model"], answer["predictions"]) == (full["model"], full["predictions"])


def test_many_at_once_get_their_own_answers(server, picture):
    images = [picture(seed=seed) for seed in range(12)]
    alone = [server.attribute(image)["explanations"] for image in images]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda image: server.attribute(image)["explanations"], images * 3))
    for explanations, expected in zip(together, alone * 3, strict=True):
        assert explanations[0]["target"] == expected[0]["target"]
        assert explanations[0]["logit"] == pytest.approx(expected[0]["logit"], abs=1e-4)
        assert explanations[0]["ledger"]["clt"] == pytest.approx(expected[0]["ledger"]["clt"], abs=1e-4)


def test_model_is_the_bundle_that_is_served(server, carded, picture):
    response = server.http.get("/v1/model")
    assert response.status_code == 200
    answer = response.json()
    assert set(answer) == {
        "name",
        "digest",
        "provider",
        "precision",
        "manifest",
        "source_baselines",
        "attention_heads",
        "circuit_dictionaries",
        "interventions",
        "card_dictionaries",
        "edits",
        "default_edit",
        "warnings",
    }
    assert answer["digest"] == carded.digest
    assert answer["provider"] == "CPUExecutionProvider"
    assert answer["source_baselines"] == ["zero", "mean"]
    assert answer["attention_heads"] == 4
    assert answer["circuit_dictionaries"] == ["clt"]
    assert answer["interventions"] == ["direct", "rerun"]
    assert answer["card_dictionaries"] == ["clt"]
    assert answer["manifest"] == json.loads((carded.path / "manifest.json").read_text())
    assert server.attribute(picture())["model"] == {"name": answer["name"], "digest": answer["digest"]}
