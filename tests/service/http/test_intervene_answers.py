"""/v1/intervene, through a real server process."""

import pytest

LABELS = ["red circle", "green square", "blue triangle"]  # the tiny bundle's
LAYERS, PATCHES, FEATURES, K, WIDTH = 3, 16, 64, 8, 32
MODES = ("direct", "rerun")


def ask(server, image, **request):
    response = server.post("/v1/intervene", image, request)
    assert response.status_code == 200, response.text
    return response.json()


def account(part):
    """What `before` and `after` have in common."""
    return {name: part[name] for name in ("predictions", "explanations", "fidelity")}


def total(ledger):
    rows = sum(ledger[name] for name in ("prior", "bias", "error", "edit", "remainder"))
    return rows + sum(ledger["attention"]) + sum(ledger["clt"])


def active(answer, layer):
    (explanation,) = answer["before"]["explanations"]
    return [feature["index"] for feature in explanation["layers"][layer]["features"]]


@pytest.mark.parametrize(
    "edits",
    [
        [],
        [{"op": "scale", "layer": 1, "index": 3, "value": 1}],
        [{"op": "scale", "layer": 1, "head": 0, "value": 1}, {"op": "scale", "row": "bias", "value": 1}],
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_what_changes_nothing_leaves_the_answer_of_attribute(server, picture, edits, mode):
    if mode == "rerun":
        edits = [item for item in edits if "row" not in item]
    explain = {"targets": LABELS[:2], "contrast": LABELS[2], "features": 4, "sources": True}
    plain = server.attribute(picture(), explain=explain)
    answer = ask(server, picture(), edits=edits, mode=mode, explain=explain)
    assert account(answer["before"]) == account(plain)
    assert (answer["mode"], answer["warnings"]) == (mode, plain["warnings"])
    (result,) = answer["results"]
    for explanation in plain["explanations"]:
        explanation["sources"] = None
    assert account(result["after"]) == account(plain)
    difference = result["difference"]
    assert not difference["top1_changes"]
    assert all(row["before"] == row["after"] for row in difference["probabilities"])
    for change in difference["explanations"]:
        assert change["logit"] == change["ledger"]["prior"] == change["ledger"]["error"] == 0
        assert change["features"] == []


def test_a_row_taken_out_has_the_drop_effect_of_the_account(server, picture):
    for layer in range(LAYERS):
        answer = ask(server, picture(), edits=[{"op": "ablate", "row": "clt", "layer": layer}])
        (explanation,), (result,) = answer["before"]["explanations"], answer["results"]
        target = explanation["target"]
        (row,) = [row for row in result["difference"]["probabilities"] if row["label"] == target]
        expected = explanation["layers"][layer]["drop_effect"]
        assert row["after"] - row["before"] == pytest.approx(expected, abs=1e-5)
        (after,) = result["after"]["explanations"]
        assert after["ledger"]["clt"][layer] == 0
        assert after["layers"][layer]["features"] == []


def test_ablating_all_features_of_a_layer_is_taking_out_its_row(server, picture):
    every = [{"op": "ablate", "layer": 1, "index": index} for index in range(FEATURES)]
    row = [{"op": "ablate", "row": "clt", "layer": 1}]
    answer = ask(server, picture(), variants=[every, row], explain={"targets": LABELS})
    one, other = (result["after"]["explanations"] for result in answer["results"])
    for a, b in zip(one, other, strict=True):
        assert a["logit"] == pytest.approx(b["logit"], abs=1e-4)
        for name in ("attention", "clt"):
            assert a["ledger"][name] == pytest.approx(b["ledger"][name], abs=1e-4)


def test_after_and_difference_add_up(server, picture):
    first = ask(server, picture(), explain={"features": K})
    index = active(first, 0)[0]
    variants = [
        [{"op": "ablate", "layer": 0, "index": index}],
        [
            {"op": "set", "layer": 2, "index": 5, "value": 4.5},
            {"op": "scale", "layer": 1, "row": "attention", "value": 0.5},
        ],
        [{"op": "project", "layer": 0, "index": index}, {"op": "ablate", "layer": 1, "head": 2}],
    ]
    answer = ask(server, picture(), variants=variants, explain={"targets": LABELS, "features": K})
    assert [len(result["edits"]) for result in answer["results"]] == [1, 2, 2]
    for result in answer["results"]:
        assert [one["target"] for one in result["after"]["explanations"]] == LABELS
        triples = zip(
            answer["before"]["explanations"],
            result["after"]["explanations"],
            result["difference"]["explanations"],
            strict=True,
        )
        for before, after, change in triples:
            assert total(after["ledger"]) == pytest.approx(after["logit"], abs=1e-4)
            assert total(change["ledger"]) == pytest.approx(change["logit"], abs=1e-4)
            assert change["logit"] == pytest.approx(after["logit"] - before["logit"], abs=1e-9)
            by_layer = [0.0] * LAYERS
            for feature in change["features"]:
                by_layer[feature["layer"]] += feature["contribution"]
            assert by_layer == pytest.approx(change["ledger"]["clt"], abs=1e-4)
        assert [round(sum(p["probability"] for p in result["after"]["predictions"]), 5)] == [1]
    one, two, three = (result["difference"]["explanations"][0] for result in answer["results"])
    (gone,) = [feature for feature in one["features"] if (feature["layer"], feature["index"]) == (0, index)]
    assert (gone["activation_before"] > 0, gone["activation_after"]) == (True, 0)
    (there,) = [feature for feature in two["features"] if (feature["layer"], feature["index"]) == (2, 5)]
    assert there["activation_after"] == pytest.approx(4.5)
    assert [change["ledger"]["edit"] == 0 for change in (one, two, three)] == [True, True, False]


def test_in_the_running_network_later_layers_see_it(server, picture):
    index = active(ask(server, picture(), explain={"features": K}), 0)[0]
    edits = [{"op": "ablate", "layer": 0, "index": index}, {"op": "project", "layer": 1, "index": 7}]
    direct, rerun = (ask(server, picture(), edits=edits, mode=mode) for mode in ("direct", "rerun"))
    assert account(direct["before"]) == account(rerun["before"])
    (result,) = rerun["results"]
    (after,), (change,) = result["after"]["explanations"], result["difference"]["explanations"]
    assert total(after["ledger"]) == pytest.approx(after["logit"], abs=1e-4)
    assert total(change["ledger"]) == pytest.approx(change["logit"], abs=1e-4)
    assert abs(change["logit"] - direct["results"][0]["difference"]["explanations"][0]["logit"]) > 1e-3
    (gone,) = [feature for feature in change["features"] if (feature["layer"], feature["index"]) == (0, index)]
    assert (gone["activation_before"] > 0, gone["activation_after"]) == (True, 0)


def test_a_direction_after_the_last_layer_is_the_same_in_both_modes(server, picture):
    vector = [(-1.0) ** number * (1 + number % 5) for number in range(WIDTH)]
    edits = [{"op": "project", "layer": LAYERS - 1, "vector": vector, "value": 2.0, "tokens": "cls"}]
    answers = [ask(server, picture(), edits=edits, mode=mode, explain={"targets": LABELS}) for mode in MODES]
    direct, rerun = ([one["logit"] for one in part["results"][0]["after"]["explanations"]] for part in answers)
    assert direct == pytest.approx(rerun, abs=1e-3)
    before = [one["logit"] for one in answers[0]["before"]["explanations"]]
    assert direct != pytest.approx(before, abs=1e-2)
    assert answers[0]["results"][0]["after"]["explanations"][0]["ledger"]["edit"] != 0


@pytest.mark.parametrize("of", ["features", "patches"])
def test_what_would_have_to_go_for_another_label(server, picture, of):
    """Of many labels the second; weights are random, and of some pictures no features make the difference."""
    labels = [f"{colour} {number}" for number in range(20) for colour in ("red", "green", "blue")]
    for seed in range(8):
        wanted = server.attribute(picture(seed=seed), labels=labels)["predictions"][1]["label"]
        asked = {"label": wanted, "of": of, "seconds": 25}
        answer = ask(server, picture(seed=seed), labels=labels, counterfactual=asked)
        if answer["results"]:
            break
    counterfactual, (result,) = answer["counterfactual"], answer["results"]
    assert (counterfactual["found"], counterfactual["minimal"], counterfactual["stopped"]) == (True, True, None)
    assert (counterfactual["rows"], counterfactual["columns"]) == (4, 4)
    assert result["after"]["predictions"][0]["label"] == wanted == counterfactual["path"][-1]["top1"]
    assert all(step["lead"] < 0 for step in counterfactual["path"][:-1])
    assert result["difference"]["top1_changes"]
    members = counterfactual["members"]
    assert 1 <= len(members) <= len(counterfactual["path"])
    if of == "patches":
        assert all(1 <= member["token"] <= PATCHES for member in members)
        return
    assert result["edits"] == [
        edit | {"layer": member["layer"], "index": member["index"], "op": "ablate"}
        for edit, member in zip(result["edits"], members, strict=True)
    ]
    variants = [result["edits"], *([edit for edit in result["edits"] if edit != one] for one in result["edits"])]
    again = ask(server, picture(seed=seed), labels=labels, mode="rerun", variants=variants)["results"]
    firsts = [variant["after"]["predictions"][0]["label"] for variant in again]
    assert [label == wanted for label in firsts] == [True, *[False] * len(members)]  # none can be put back


def test_nothing_has_to_go_for_the_first_label(server, picture):
    top1 = server.attribute(picture())["predictions"][0]["label"]
    answer = ask(server, picture(), counterfactual=top1)
    counterfactual, (result,) = answer["counterfactual"], answer["results"]
    assert (counterfactual["found"], counterfactual["members"], counterfactual["path"]) == (True, [], [])
    assert account(result["after"]) == account(answer["before"])


def test_a_search_keeps_to_its_bounds(server, picture):
    last = server.attribute(picture())["predictions"][-1]["label"]
    for bounds, stopped, steps in (({"members": 1}, "members", 1), ({"seconds": 1e-6}, "seconds", 0)):
        answer = ask(server, picture(), counterfactual={"label": last, "of": "patches", **bounds})
        counterfactual = answer["counterfactual"]
        assert (counterfactual["found"], counterfactual["stopped"]) == (False, stopped)
        assert (len(counterfactual["path"]), counterfactual["members"], answer["results"]) == (steps, [], [])


@pytest.mark.parametrize(
    ("request_part", "said"),
    [
        (
            {"edits": [{"op": "ablate", "layer": 3, "index": 0}]},
            "intervention 0: there is no layer 3, only layers 0 to 2",
        ),
        ({"edits": [{"op": "ablate", "row": "bias"}, {"op": "ablate", "layer": 0, "index": 64}]}, "intervention 1"),
        (
            {"variants": [[], [{"op": "ablate", "layer": 0, "head": 99}]]},
            "variants.1: intervention 0: there is no head",
        ),
        ({"edits": [{"op": "ablate", "layer": 0, "index": 1, "tokens": "patches"}]}, "`mode: rerun` can change all"),
        ({"edits": [{"op": "ablate", "layer": 0, "index": 1, "tokens": [17]}]}, "tokens 0 to 16"),
        ({"edits": [{"op": "ablate", "layer": 0, "row": "mlp"}]}, "use `mode: rerun` to change it"),
        ({"edits": [{"op": "ablate", "row": "bias"}] * 2}, "intervention 1 changes the same as an earlier one"),
        ({"edits": [{"op": "ablate", "row": "features"}]}, "edits.0.row"),
        ({"edits": [{"op": "ablate"}]}, "edits.0: give exactly one of"),
        ({"edits": [{"op": "ablate", "layer": 0, "index": 0, "dictionary": "residual"}]}, "only in `mode: rerun`"),
        ({"edits": [{"op": "ablate", "row": "bias"}], "mode": "rerun"}, "use `mode: direct` to change it"),
        ({"edits": [{"op": "set", "layer": 0, "index": 0, "value": "NaN"}]}, "edits.0.value"),
        ({"edits": [{"op": "ablate", "row": "bias"}] * 257}, "at most 256"),
        ({"variants": []}, "variants"),
        (
            {"edits": [{"op": "ablate", "row": "bias"}], "counterfactual": "red circle"},
            "edits and counterfactual cannot be used together",
        ),
        ({"counterfactual": "unicorn"}, "not among the labels"),
        ({"counterfactual": {"label": LABELS[0], "of": "patches", "members": 1_000}}, "at most 256"),
        ({"explain": {"heatmap": True}}, "explain.heatmap"),
        ({"explain": {"contrast": "unicorn"}}, "not among the labels"),
        ({"mode": "replay"}, "mode"),
    ],
)
def test_what_cannot_be_asked(server, picture, request_part, said):
    response = server.post("/v1/intervene", picture(), request_part)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"], response.text
