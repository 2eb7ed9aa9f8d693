"""A bundle without a CLT, through a real server process: what is answered, and what is refused by name."""

import pytest

LABELS = ["red circle", "green square", "blue triangle"]  # the bundle's
LAYERS, PATCHES = 3, 16
ALL = {"heatmap": True, "lens": True, "sources": True, "attention": {"layer": 2, "head": 1, "pairs": 4}}


@pytest.fixture(scope="module")
def server(plain_bundle, start_server):
    with start_server(VITRINE_BUNDLE=plain_bundle.path) as running:
        yield running


def total(ledger):
    """Of the rows, as the contract has their sum without a CLT."""
    return sum(ledger[name] for name in ("prior", "bias", "edit", "remainder")) + sum(
        sum(ledger[name]) for name in ("attention", "mlp")
    )


def test_the_account_adds_up_by_the_mlps_rows(server, picture, plain_bundle):
    answer = server.attribute(picture(), explain={"targets": LABELS, "features": 9})
    assert answer["fidelity"] is None
    for explanation in answer["explanations"]:
        ledger = explanation["ledger"]
        assert (ledger["clt"], ledger["error"], len(ledger["mlp"])) == ([], 0, LAYERS)
        assert total(ledger) == pytest.approx(explanation["logit"], abs=1e-9)
        assert abs(ledger["remainder"]) < 1e-3
        for layer, row in zip(explanation["layers"], ledger["mlp"], strict=True):
            assert layer["contribution"] == row != 0
            assert (layer["projection"], layer["features"]) == (None, [])
            assert layer["share"] > 0
    manifest = server.http.get("/v1/model").json()["manifest"]
    assert (manifest["shape"]["features"], manifest["data"]) == (0, None)


def test_heat_map_lens_sources_and_attention_are_there(server, picture):
    answer = server.attribute(picture(), explain=ALL)
    (explanation,) = answer["explanations"]
    heatmap, sources, attention = explanation["heatmap"], explanation["sources"], answer["attention"]
    split = zip(heatmap["patches"], heatmap["class_token"], heatmap["constant"], strict=True)
    for row, (patches, class_token, constant) in zip(explanation["ledger"]["attention"], split, strict=True):
        assert sum(patches) + class_token + constant == pytest.approx(row, abs=1e-4)
    assert answer["lens"][-1]["label"] == answer["predictions"][0]["label"]
    assert sources["features"] == []
    errors = sum(layer["error"] for layer in sources["layers"])
    assert errors + sum(sources["embedding"]) + sources["constants"] + sources["remainder"] == pytest.approx(
        explanation["logit"], abs=1e-3
    )
    assert abs(sources["remainder"]) <= 1e-3
    assert attention["pairs"] == []
    for side in (attention["of_query"], attention["of_key"]):
        assert side["features"] == []
        assert abs(side["remainder"]) <= 1e-3


def test_rows_and_heads_can_be_taken_out(server, picture):
    edits = [[{"op": "ablate", "layer": 1, "row": "mlp"}], [{"op": "ablate", "layer": 2, "head": 0}]]
    for mode in ("direct", "rerun"):
        response = server.post("/v1/intervene", picture(), {"variants": edits, "mode": mode})
        assert response.status_code == 200, response.text
        answer = response.json()
        (before,) = answer["before"]["explanations"]
        for result in answer["results"]:
            (after,), (change,) = result["after"]["explanations"], result["difference"]["explanations"]
            assert total(after["ledger"]) == pytest.approx(after["logit"], abs=1e-3)
            assert change["logit"] == pytest.approx(after["logit"] - before["logit"], abs=1e-9)
            assert change["logit"] != 0
            assert change["features"] == []
            assert result["after"]["fidelity"] is None
        without_mlp = answer["results"][0]["after"]["explanations"][0]["ledger"]["mlp"]
        assert without_mlp[1] == 0 != before["ledger"]["mlp"][1]


def test_patches_can_be_looked_for_that_would_have_to_go(server, picture):
    wanted = {"label": LABELS[2], "of": "patches"}
    response = server.post("/v1/intervene", picture(), {"counterfactual": wanted})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "request_", "status", "code"),
    [
        ("/v1/circuit", {}, 400, "invalid_request"),
        ("/v1/attribute", {"explain": {"matrix": True}}, 400, "invalid_request"),
        ("/v1/attribute", {"explain": {"sources": True, "baseline": "mean"}}, 400, "invalid_request"),
        ("/v1/intervene", {"counterfactual": "red circle"}, 400, "invalid_request"),
        ("/v1/intervene", {"edits": [{"op": "ablate", "layer": 0, "index": 3}]}, 400, "invalid_request"),
        ("/v1/similar", {}, 404, "no_cards"),
    ],
)
def test_what_is_of_features_is_refused_by_name(server, picture, path, request_, status, code):
    response = server.post(path, picture(), request_)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert "has no CLT" in error["message"]
    assert "vitrine train" in error["message"]


@pytest.mark.parametrize("path", ["/v1/features/0/3", "/v1/features"])
def test_there_are_no_cards(server, path):
    response = server.http.get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "no_cards")
    assert "has no CLT" in response.json()["error"]["message"]


def test_the_model_says_what_it_has(server):
    model = server.http.get("/v1/model").json()
    assert model["circuit_dictionaries"] == model["card_dictionaries"] == []
    assert model["source_baselines"] == ["zero"]
    assert model["attention_heads"] > 0
    assert model["interventions"] == ["direct", "rerun"]


def test_its_metrics_have_the_layers_shares_and_no_fidelity(server, picture):
    server.attribute(picture())
    metrics = server.http.get("/metrics").text
    assert 'vitrine_layer_share_count{layer="2"}' in metrics
    samples = [line for line in metrics.splitlines() if line.startswith("vitrine_fidelity_r2_count")]
    assert all(line.endswith(" 0.0") for line in samples)
