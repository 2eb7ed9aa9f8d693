"""Why a head looks where it does: in answers, through a real server process."""

import json

import pytest

TOKENS, PATCHES = 17, 16
EVERYTHING = {"features": 100, "pairs": 1000}


def ask(server, image, **attention):
    return server.attribute(image, explain={"attention": attention})["attention"]


def total(side):
    layers = sum(layer[name] for layer in side["layers"] for name in ("features", "error", "bias"))
    return layers + sum(side["embedding"]) + side["constants"] + side["remainder"]


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("place", [(0, 1, 0, 3), (1, 0, 5, 0), (2, 1, 0, 16)])
def test_both_ends_sum_to_what_is_explained(server, picture, relative, place):
    layer, head, query, key = place
    account = ask(server, picture(), layer=layer, head=head, query=query, key=key, relative=relative)
    assert [account[name] for name in ("layer", "head", "query", "key", "relative")] == [*place, relative]
    mean = account["mean_score"] if relative else 0
    assert account["explained"] == pytest.approx(account["score"] - mean, abs=1e-6)
    assert account["weight"] == pytest.approx(account["weights"][key], abs=1e-7)
    assert sum(account["weights"]) == pytest.approx(1, abs=1e-5)
    for side in (account["of_query"], account["of_key"]):
        assert side["logit"] == account["explained"]
        assert total(side) == pytest.approx(account["explained"], abs=1e-6)
        assert abs(side["remainder"]) <= 1e-3
        assert [row["layer"] for row in side["layers"]] == list(range(layer))
        assert len(side["embedding"]) == TOKENS
        for feature in side["features"]:
            assert feature["layer"] < layer
            assert sum(feature["tokens"]) == pytest.approx(feature["contribution"], abs=1e-5)
    assert bool(account["of_key"]["features"]) == bool(account["pairs"]) == (layer > 0)
    assert account["rows"] * account["columns"] == PATCHES


def test_the_default_is_what_the_class_token_looks_at_most(server, picture):
    account = ask(server, picture(), layer=2, head=0)
    assert (account["query"], account["relative"]) == (0, True)
    assert account["weight"] == max(account["weights"]) == account["weights"][account["key"]]
    assert account == ask(server, picture(), layer=2, head=0, key=account["key"])


def test_pairs_and_all_else_are_the_score(server, picture):
    account = ask(server, picture(), layer=2, head=1, **EVERYTHING)
    pairs = account["pairs"]
    sizes = [abs(pair["contribution"]) for pair in pairs]
    assert sizes == sorted(sizes, reverse=True)
    listed = sum(pair["contribution"] for pair in pairs)
    assert listed + account["other_pairs"] == pytest.approx(account["explained"], abs=1e-6)
    assert len({json.dumps([pair["query"], pair["key"]]) for pair in pairs}) == len(pairs) == 1000
    queries = {(f["layer"], f["index"]) for f in account["of_query"]["features"]}
    assert {(pair["query"]["layer"], pair["query"]["index"]) for pair in pairs} <= queries
    fewer = ask(server, picture(), layer=2, head=1, features=100, pairs=3)
    assert fewer["pairs"] == pairs[:3]
    none = ask(server, picture(), layer=2, head=1, pairs=0)
    assert (none["pairs"], none["other_pairs"]) == ([], none["explained"])


def test_features_have_the_labels_of_their_cards(server, picture):
    account = ask(server, picture(), layer=2, head=1, **EVERYTHING)
    listed = [
        *account["of_query"]["features"],
        *(end for pair in account["pairs"] for end in (pair["query"], pair["key"])),
    ]
    labelled = [feature for feature in listed if feature["label"]]
    assert labelled
    for feature in labelled[:3] + labelled[-3:]:
        card = server.http.get(f"/v1/features/{feature['layer']}/{feature['index']}").json()
        assert card["label"] == feature["label"]


def test_it_stands_beside_whatever_else_is_asked(server, picture):
    explain = {"attention": {"layer": 1, "head": 1}, "sources": True, "baseline": "mean", "heatmap": True}
    answer = server.attribute(picture(), explain=explain)
    assert answer["attention"] == ask(server, picture(), layer=1, head=1)
    assert answer["explanations"][0]["sources"]["layers"][0]["baseline"] is not None
    assert {"sources", "attention"} <= answer["timings_ms"].keys()
    answer = server.attribute(picture())
    assert answer["attention"] is None
    assert "attention" not in answer["timings_ms"]


def test_a_batch_has_each_images_own(server, picture):
    pictures = [picture(seed=seed) for seed in range(2)]
    request = {"explain": {"attention": {"layer": 2, "head": 0, "pairs": 2}}}
    files = [("image", (f"{n}.png", data)) for n, data in enumerate(pictures)]
    answer = server.http.post("/v1/attribute:batch", files=[*files, ("request", (None, json.dumps(request)))])
    for data, result in zip(pictures, answer.json()["results"], strict=True):
        assert result["answer"]["attention"] == ask(server, data, layer=2, head=0, pairs=2)


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        ({"layer": 3, "head": 0}, "`explain.attention.layer` is 3; this CLIP allows 0 to 2"),
        ({"layer": 0, "head": 4}, "`explain.attention.head` is 4; this CLIP allows 0 to 3"),
        ({"layer": 0, "head": 0, "query": 17}, "`explain.attention.query` is 17; this CLIP allows 0 to 16"),
        ({"layer": 0, "head": 0, "key": 9_999}, "`explain.attention.key` is 9,999; this CLIP allows 0 to 16"),
        ({"layer": -1, "head": 0}, "explain.attention.layer"),
        ({"layer": 0}, "explain.attention.head"),
        ({"layer": 0, "head": 0, "features": 101}, "explain.attention.features"),
        ({"layer": 0, "head": 0, "pairs": "all"}, "explain.attention.pairs"),
        ({"layer": 0, "head": 0, "token": 3}, "explain.attention.token"),
        (True, "explain.attention"),
    ],
)
def test_what_cannot_be_asked(server, picture, attention, said):
    response = server.post_json("/v1/attribute", picture(), explain={"attention": attention})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "invalid_request"
    assert said in error["message"]
