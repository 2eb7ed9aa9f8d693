"""/v1/circuit, through a real server process."""

import math

import pytest

LABELS = ["red circle", "green square", "blue triangle"]  # the tiny bundle's
LAYERS, PATCHES = 3, 16
ALL = {"nodes": 512, "seconds": 60, "node_share": 1, "edge_share": 1, "leaves": True}


def ask(server, image, **request):
    response = server.post("/v1/circuit", image, request)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_whole_graph_is_the_source_account_of_its_target(server, picture):
    answer = ask(server, picture(), **ALL)
    explanation = server.attribute(picture(), explain={"sources": True, "source_features": 100_000})["explanations"][0]
    assert answer["target"] == answer["predictions"][0]["label"] == explanation["target"]
    assert answer["logit"] == pytest.approx(explanation["sources"]["logit"], abs=1e-4)
    assert (answer["rows"], answer["columns"]) == (4, 4)
    totals = {}
    for node in answer["nodes"]:
        if node["kind"] == "feature":
            key = node["layer"], node["index"]
            totals[key] = totals.get(key, 0) + node["contribution"]
    for feature in explanation["sources"]["features"]:
        if abs(feature["contribution"]) > 1e-4:
            assert totals[feature["layer"], feature["index"]] == pytest.approx(feature["contribution"], abs=1e-4)
    into_target = {edge["source"]: edge["weight"] for edge in answer["edges"] if edge["target"] is None}
    for place, weight in into_target.items():
        assert weight == pytest.approx(answer["nodes"][place]["contribution"], abs=1e-5)


def test_edges_lead_from_earlier_layers_to_later_ones(server, picture):
    answer = ask(server, picture(), **ALL)
    nodes, edges = answer["nodes"], answer["edges"]
    assert any(edge["target"] is not None for edge in edges)
    for edge in edges:
        source = nodes[edge["source"]]
        target = LAYERS if edge["target"] is None else nodes[edge["target"]]["layer"]
        assert source["kind"] == "embedding" or source["layer"] < target
        assert edge["target"] is None or nodes[edge["target"]]["followed"]
        assert math.isfinite(edge["weight"])
    assert all((node["index"] is None) == (node["kind"] != "feature") for node in nodes)
    assert all((node["layer"] is None) == (node["kind"] == "embedding") for node in nodes)
    assert all(0 <= node["token"] <= PATCHES for node in nodes)
    influence = [node["influence"] for node in nodes]
    assert influence == sorted(influence, reverse=True)
    assert any(node["label"] for node in nodes)


def test_scores_say_where_the_influence_ends(server, picture):
    for nodes in (0, 20, 512):
        scores = (answer := ask(server, picture(), nodes=nodes, seconds=60))["scores"]
        ends = [scores[name] for name in ("embeddings", "errors", "left_out", "constant")]
        assert sum(ends) == pytest.approx(1, abs=1e-4)
        assert 0 <= scores["replacement"] <= 1
        assert 0 <= scores["completeness"] <= 1
        assert answer["followed"] == min(nodes, answer["followed"])
    assert scores["left_out"] < 0.02
    assert answer["active"] > answer["followed"] > 20


def into(answer, place):
    """Sum of the listed edges into a node, or into the target (None), and of what its inflow says beside them."""
    inflow = answer["inflow"] if place is None else answer["nodes"][place]["inflow"]
    edges = sum(edge["weight"] for edge in answer["edges"] if edge["target"] == place)
    return edges + inflow["unfollowed"] + inflow["pruned"] + inflow["constant"]


@pytest.mark.parametrize("leaves", [False, True])
def test_what_flows_into_a_node_adds_up(server, picture, leaves):
    answer = ask(server, picture(), nodes=20, seconds=60, leaves=leaves)
    assert into(answer, None) == pytest.approx(answer["logit"], abs=1e-4)
    followed = [place for place, node in enumerate(answer["nodes"]) if node["followed"]]
    assert followed
    for place in followed:
        assert into(answer, place) == pytest.approx(answer["nodes"][place]["activation"], abs=1e-4)
        assert 0 <= answer["nodes"][place]["inflow"]["unfollowed_share"] <= 1
    assert any(answer["nodes"][place]["inflow"]["unfollowed"] for place in followed)
    assert answer["inflow"]["unfollowed_share"] > 0.01
    assert all((node["inflow"] is not None) == node["followed"] for node in answer["nodes"])


def test_features_that_were_not_followed_are_listed_on_request(server, picture):
    """With few followed some influence ends at features that were not; by default they are no nodes."""
    plain, whole = (ask(server, picture(), **ALL | {"nodes": 4, "leaves": leaves}) for leaves in (False, True))
    assert plain["scores"] == pytest.approx(whole["scores"], abs=1e-6)
    assert plain["scores"]["left_out"] > 0.02
    features = [node for node in plain["nodes"] if node["kind"] == "feature"]
    assert all(node["followed"] for node in features)
    assert len(features) == plain["kept"] <= plain["followed"] == 4
    assert plain["kept_share"] == pytest.approx(plain["kept"] / plain["active"])
    leaves = [node for node in whole["nodes"] if node["kind"] == "feature" and not node["followed"]]
    assert leaves
    assert whole["kept"] > plain["kept"]
    assert len(plain["nodes"]) < len(whole["nodes"])


def test_pruning_leaves_less(server, picture):
    whole, pruned = ask(server, picture(), **ALL), ask(server, picture(), nodes=512, seconds=60, leaves=True)
    assert len(pruned["nodes"]) < len(whole["nodes"])
    assert len(pruned["edges"]) < len(whole["edges"])
    assert pruned["scores"] == pytest.approx(whole["scores"], abs=1e-6)


def test_a_target_and_a_contrast(server, picture):
    answer = ask(server, picture(), target=LABELS[1], contrast=LABELS[2], nodes=5)
    one, other = (ask(server, picture(), target=label, nodes=0)["logit"] for label in LABELS[1:])
    assert (answer["target"], answer["contrast"]) == (LABELS[1], LABELS[2])
    assert answer["logit"] == pytest.approx(one - other, abs=1e-4)
    assert answer["followed"] == 5


def test_a_label_against_itself_has_an_empty_circuit(server, picture):
    answer = ask(server, picture(), target=LABELS[0], contrast=LABELS[0])
    assert answer["logit"] == 0
    assert answer["nodes"] == answer["edges"] == []


@pytest.mark.parametrize(
    ("request_part", "said"),
    [
        ({"nodes": 100_000}, "at most 512"),
        ({"nodes": -1}, "nodes"),
        ({"seconds": 0}, "seconds"),
        ({"seconds": "NaN"}, "seconds"),
        ({"node_share": 1.5}, "node_share"),
        ({"edge_share": 0}, "edge_share"),
        ({"target": "unicorn"}, "not among the labels"),
        ({"contrast": "unicorn"}, "not among the labels"),
        ({"explain": {}}, "explain"),
        ({"leaves": "yes"}, "leaves"),
        ({"dictionary": "sae"}, "dictionary"),
        ({"dictionary": "residual"}, "exported without them"),
    ],
)
def test_what_cannot_be_asked(server, picture, request_part, said):
    response = server.post("/v1/circuit", picture(), request_part)
    assert response.status_code == 400
    assert said in response.text
