"""Attribution graphs for other viewers: they fit the viewers' schemas, restated here, and add up to the logit."""

import asyncio
import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from common import ROOT
from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.bundle.cards import Card, Exemplar
from vitrine.service.answers.attribute import answer_attribute
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.circuit import answer_circuit
from vitrine.service.exports.circuit_graph import circuit_graph
from vitrine.service.exports.circuit_tracer import (
    CircuitError,
    attribution_graph,
    feature_details,
    feature_number,
    write_graphs,
)
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import (
    AttributeRequest,
    AttributeResponse,
    Explanation,
    Feature,
    Fidelity,
    HeatMap,
    LayerAccount,
    LedgerAccount,
)
from vitrine.service.schemas.base import Model
from vitrine.service.schemas.circuit import CircuitRequest
from vitrine.service.schemas.classify import Prediction

DEMO = ROOT / "models/demo"
NUMBER = (int, float)
STRINGS, NUMBERS = [str], [NUMBER]
# Neuronpedia, apps/webapp/app/api/graph/graph-schema.json: what is required, and of what type; then
# circuit-tracer 0.5.0, circuit_tracer/frontend/graph_models.py, whose fields have no defaults in the viewer's page. The
# package needs torch, transformer-lens and nnsight, so that its models are restated here; the published ones themselves
# read the demo's graphs, of accounts and of circuits, without and with pydantic's strict mode (0.5.0, November 2026).
GRAPH = {
    "metadata": {
        "slug": str,
        "scan": str,
        "prompt_tokens": STRINGS,
        "prompt": str,
        "transcoder_list": STRINGS,
        "node_threshold": NUMBER,
        "schema_version": int,
        "info": {"description": str, "generator": {"name": str}},
        "generation_settings": dict,
    },
    "qParams": {"pinnedIds": STRINGS, "supernodes": [STRINGS], "linkType": str, "clickedId": str, "sg_pos": str},
    "nodes": [
        {
            "node_id": str,
            "feature": int,
            "layer": str,
            "ctx_idx": int,
            "feature_type": str,
            "jsNodeId": str,
            "clerp": str,
            "token_prob": NUMBER,
            "is_target_logit": bool,
            "run_idx": int,
            "reverse_ctx_idx": int,
            "influence": (*NUMBER, type(None)),
            "activation": (*NUMBER, type(None)),
        }
    ],
    "links": [{"source": str, "target": str, "weight": NUMBER}],
}
# circuit-tracer 0.5.0, circuit_tracer/frontend/feature_models.py; of these Neuronpedia's feature-details-schema.json
# requires `index` and, in `examples_quantiles`, all but the last two.
FEATURE = {
    "transcoder_id": str,
    "index": int,
    "examples_quantiles": [
        {
            "quantile_name": str,
            "examples": [
                {"tokens": STRINGS, "tokens_acts_list": NUMBERS, "train_token_ind": int, "is_repeated_datapoint": bool}
            ],
        }
    ],
    "top_logits": STRINGS,
    "bottom_logits": STRINGS,
    "act_min": NUMBER,
    "act_max": NUMBER,
    "quantile_values": NUMBERS,
    "histogram": NUMBERS,
    "activation_frequency": NUMBER,
}
TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


def check_schema(value, schema, where="$"):
    """Assert that `value` has the fields of `schema`, with their types, and no others."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        assert set(value) == set(schema), where
        for name, part in schema.items():
            check_schema(value[name], part, f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for place, item in enumerate(value):
            check_schema(item, schema[0], f"{where}[{place}]")
    else:
        assert isinstance(value, schema), where
        assert not isinstance(value, bool) or schema is bool, where
        assert not isinstance(value, float) or math.isfinite(value), where


def as_json(part):
    return json.loads(part.model_dump_json())


def ask(bundle, image, **explain):
    """(answer, its label set), computed in this process, with everything that a graph needs."""

    async def run():
        async with Attributor(bundle, Settings(bundle=bundle.path)) as attributor:
            request = {"top_k": 1000, "explain": {"features": 1000, "heatmap": True, **explain}}
            answer = await answer_attribute(attributor, image, AttributeRequest.model_validate(request), "test")
            labels = attributor.labels
            return answer, await labels.resolve(
                labels.default_labels, labels.default_templates, attributor.batcher.run_between
            )

    return asyncio.run(run())


@pytest.fixture(scope="module", params=["tiny", "demo"])
def opened(request, carded):
    return carded if request.param == "tiny" else open_bundle(DEMO)


@pytest.fixture(scope="module", params=["alone", "contrast"])
def answer(request, opened, picture):
    target, contrast = opened.manifest.text.labels[1], opened.manifest.text.labels[0]
    return ask(opened, picture(), targets=[target], contrast=contrast if request.param == "contrast" else None)[0]


@pytest.fixture(scope="module")
def graph(answer):
    return as_json(attribution_graph(answer, answer.explanations[0], "cat.png", "cat", "./data/cat-features"))


def make_answer(**changes):
    """An answer of two layers, two rows of three patches, and small numbers that add up to 3.5."""
    features = [
        Feature(index=5, activation=2.0, contribution=1.0, label="fur", label_score=0.5),
        Feature(index=0, activation=0.5, contribution=-0.25),
        Feature(index=0, activation=4.0, contribution=0.5),
    ]
    shared_fields = {"share": 0.1, "projection": 0.5, "drop_effect": 0.1}
    layers = [
        LayerAccount(layer=0, contribution=0.75, features=features[:2], **shared_fields),
        LayerAccount(layer=1, contribution=0.5, features=features[2:], **shared_fields),
    ]
    heatmap = HeatMap(
        rows=2,
        columns=3,
        total=[0.125, 0.25, 0.5, -0.125, -0.25, 0.75],
        patches=[[0.125, 0.25, 0.5, 0, 0, 0], [0, 0, 0, -0.125, -0.25, 0.75]],
        heads=[[0.875], [0.375]],
        class_token=[0.0625, 0.1875],
        constant=[0.03125, 0.09375],
        outliers=[],
    )
    ledger = LedgerAccount(
        prior=0.25, attention=[0.96875, 0.65625], clt=[0.75, 0.5], bias=0.125, error=0.25, remainder=0
    )
    explanation = Explanation(target="cat", contrast=None, logit=3.5, ledger=ledger, layers=layers, heatmap=heatmap)
    return AttributeResponse(
        request_id="test",
        model=Model(name="tiny", digest="sha256:abc"),
        predictions=[
            Prediction(label="dog", probability=0.25, logit=3, cosine=0.3),
            Prediction(label="cat", probability=0.5, logit=3.5, cosine=0.35),
        ],
        explanations=[explanation.model_copy(update=changes)],
        fidelity=Fidelity(r2=1, cosine=1, error_share=0, reconstructed_top1_agrees=True),
        timings_ms={},
    )


def make_graph(**changes):
    answer = make_answer(**changes)
    return as_json(attribution_graph(answer, answer.explanations[0], "cat.png", "cat", "./data/cat-features"))


def by_id(graph):
    return {node["node_id"]: node for node in graph["nodes"]}


def weights(graph):
    return {link["source"]: link["weight"] for link in graph["links"]}


def test_graph_fits_the_viewers_schemas(graph, answer):
    check_schema(graph, GRAPH)
    assert {node["feature_type"] for node in graph["nodes"]} == TYPES
    assert graph["qParams"]["clickedId"] in by_id(graph)
    assert len(graph["metadata"]["transcoder_list"]) == len(answer.explanations[0].layers)
    # Both viewers parse the logit's share in this way; without it they fail.
    (logit,) = [node for node in graph["nodes"] if node["feature_type"] == "logit"]
    assert float(logit["clerp"].split("(p=")[1].split(")")[0]) == round(logit["token_prob"], 3)


def test_ids_are_unique_and_every_link_has_both_ends(graph):
    nodes = by_id(graph)
    assert len(nodes) == len(graph["nodes"]) == len({node["jsNodeId"] for node in graph["nodes"]})
    # The viewers' own key; they treat nodes that share it as one feature.
    assert len({(node["layer"], node["feature"], node["ctx_idx"]) for node in graph["nodes"]}) == len(nodes)
    (logit,) = [name for name, node in nodes.items() if node["feature_type"] == "logit"]
    assert {link["target"] for link in graph["links"]} == {logit}
    assert sorted(link["source"] for link in graph["links"]) == sorted(set(nodes) - {logit})
    assert all(node["ctx_idx"] < len(graph["metadata"]["prompt_tokens"]) for node in graph["nodes"])


def test_links_add_up_to_the_logit(graph, answer):
    explanation, settings = answer.explanations[0], graph["metadata"]["generation_settings"]
    linked = sum(link["weight"] for link in graph["links"])
    parts = linked + settings["bias"] + sum(settings["attention_constants"]) + settings["remainder"]
    assert parts == pytest.approx(explanation.logit, abs=1e-9)
    assert settings["logit"] == explanation.logit
    assert abs(settings["remainder"]) < 1e-4, "it is rounding, and nothing that the graph forgot"


def test_links_are_the_ledgers_rows(graph, answer):
    explanation, nodes, weight_of = answer.explanations[0], by_id(graph), weights(graph)

    def total(kind, layer=None):
        return sum(
            weight
            for name, weight in weight_of.items()
            if nodes[name]["feature_type"] == kind and layer in (None, nodes[name]["layer"])
        )

    for layer, row in enumerate(explanation.ledger.clt):
        assert total("cross layer transcoder", str(layer)) == pytest.approx(row, abs=1e-4)
    expected = explanation.ledger.prior + sum(explanation.ledger.attention) - sum(explanation.heatmap.constant)
    assert total("embedding") == pytest.approx(expected, abs=1e-4)
    assert total("mlp reconstruction error") == explanation.ledger.error
    assert len(graph["nodes"]) == len(explanation.heatmap.total) + 3 + sum(
        len(layer.features) for layer in explanation.layers
    )


def test_features_are_the_answers(graph, answer):
    nodes, weight_of = by_id(graph), weights(graph)
    for layer in answer.explanations[0].layers:
        for feature in layer.features:
            node = nodes[f"{layer.layer}_{feature.index}_0"]
            assert weight_of[node["node_id"]] == feature.contribution
            assert node["activation"] == feature.activation
            assert node["clerp"] == (feature.label or "")


def test_nodes_of_a_small_account():
    graph = make_graph()
    assert graph["metadata"]["prompt_tokens"] == ["[CLS]", "p(0,0)", "p(0,1)", "p(0,2)", "p(1,0)", "p(1,1)", "p(1,2)"]
    assert weights(graph) == {
        "E_0_0": 0.5,
        "E_1_1": 0.125,
        "E_2_2": 0.25,
        "E_3_3": 0.5,
        "E_4_4": -0.125,
        "E_5_5": -0.25,
        "E_6_6": 0.75,
        "0_5_0": 1.0,
        "0_0_0": -0.25,
        "1_0_0": 0.5,
        "1_-1_0": 0.25,
    }
    nodes = by_id(graph)
    assert [nodes[f"E_{place}_{place}"]["ctx_idx"] for place in range(7)] == list(range(7))
    assert {name: node["jsNodeId"] for name, node in nodes.items() if node["layer"] != "E"} == {
        "0_5_0": "0_5-0",
        "0_0_0": "0_0-0",
        "1_0_0": "1_0-0",
        "1_-1_0": "1_-1-0",
        "3_0_0": "L_0-0",
    }
    numbers = {name: node["feature"] for name, node in nodes.items() if node["layer"] != "E"}
    assert numbers == {"0_5_0": 20, "0_0_0": 0, "1_0_0": 1, "1_-1_0": -1, "3_0_0": 0}
    logit = nodes["3_0_0"]
    assert (logit["clerp"], logit["token_prob"], logit["is_target_logit"]) == ('Output "cat" (p=0.500)', 0.5, True)
    assert graph["metadata"]["generation_settings"] == {
        "model": {"name": "tiny", "digest": "sha256:abc"},
        "target": "cat",
        "contrast": None,
        "logit": 3.5,
        "bias": 0.125,
        "attention_constants": [0.03125, 0.09375],
        "remainder": 0,
    }


def test_what_the_graph_misses_is_its_remainder():
    assert make_graph(logit=3.75)["metadata"]["generation_settings"]["remainder"] == 0.25


def test_influence_is_the_share_down_to_a_node():
    """As in circuit-tracer: the cumulative share of nodes sorted by |effect|, largest first."""
    graph = make_graph()
    nodes, weight_of = by_id(graph), weights(graph)
    gross = sum(map(abs, weight_of.values()))
    assert nodes["0_5_0"]["influence"] == 1 / gross
    assert nodes["E_6_6"]["influence"] == 1.75 / gross
    order = sorted(weight_of, key=lambda name: nodes[name]["influence"])
    assert all(abs(weight_of[one]) >= abs(weight_of[other]) for one, other in pairwise(order))
    assert nodes[order[-1]]["influence"] == 1
    assert nodes["3_0_0"]["influence"] is None


def test_influence_never_passes_the_threshold(graph):
    shares = [node["influence"] for node in graph["nodes"] if node["feature_type"] != "logit"]
    assert max(shares) <= graph["metadata"]["node_threshold"] == 1
    assert min(shares) >= 0


def test_an_account_of_nothing_is_drawn():
    """A label contrasted with itself."""
    answer = make_answer(contrast="cat")
    explanation = answer.explanations[0]
    empty = explanation.heatmap.model_copy(update={"total": [0] * 6, "class_token": [0] * 2, "constant": [0] * 2})
    ledger = LedgerAccount(prior=0, attention=[0, 0], clt=[0, 0], bias=0, error=0, remainder=0)
    layers = [layer.model_copy(update={"contribution": 0, "features": []}) for layer in explanation.layers]
    graph = make_graph(contrast="cat", heatmap=empty, ledger=ledger, layers=layers, logit=0)
    check_schema(graph, GRAPH)
    assert set(weights(graph).values()) == {0}


def test_a_contrast_is_named_with_the_targets_probability():
    graph = make_graph(contrast="dog")
    logit = by_id(graph)["3_0_0"]
    assert (logit["clerp"], logit["token_prob"]) == ('Output "cat - dog" (p=0.500)', 0.5)
    assert graph["metadata"]["prompt"] == "cat.png: why cat rather than dog"
    assert graph["metadata"]["generation_settings"]["contrast"] == "dog"


def test_a_feature_without_a_label_has_no_clerp():
    nodes = by_id(make_graph())
    assert (nodes["0_5_0"]["clerp"], nodes["0_0_0"]["clerp"]) == ("fur", "")


HOSTILE = 'a "cat" (p=1)\n<img src=x onerror=alert(1)> \\ \u2028 \U0001f408 </script>'


def test_hostile_labels_stay_text(tmp_path):
    answer = make_answer(target=HOSTILE)
    answer.predictions[1].label = HOSTILE
    answer.explanations[0].layers[0].features[0].label = HOSTILE
    (path,) = write_graphs(tmp_path / "cat.json", answer, "<b>.png", None, None, None)
    graph = json.loads(path.read_text(encoding="utf-8"))
    check_schema(graph, GRAPH)
    assert graph["metadata"]["generation_settings"]["target"] == HOSTILE
    logit, feature = by_id(graph)["3_0_0"], by_id(graph)["0_5_0"]
    for node in (logit, feature):
        assert not set("<>\n") & set(node["clerp"])
        assert "‹img src=x onerror=alert(1)›" in node["clerp"]
    assert logit["clerp"].split('"')[1].startswith("a ”cat” (p=1)⏎"), "the viewers' way to the logit's name"
    assert feature["clerp"].endswith("\U0001f408 ‹/script›")


def test_an_image_whose_name_is_no_text_is_drawn():
    answer = make_answer()
    graph = attribution_graph(answer, answer.explanations[0], "cat\udcff.png", "cat", "")
    assert graph.metadata.prompt == "cat?.png: why cat"


@pytest.mark.parametrize(
    ("name", "scan"), [("b32-v1.0", "custom-b32-v1.0"), ("my bundle/ü", "custom-my-bundle--")], ids=["plain", "odd"]
)
def test_scan_is_made_of_what_neuronpedia_takes(name, scan):
    answer = make_answer()
    answer.model.name = name
    metadata = attribution_graph(answer, answer.explanations[0], "", "cat", "").metadata
    assert (metadata.scan, metadata.generation_settings["model"]["name"]) == (scan, name)


def without_last_feature():
    first, second = make_answer().explanations[0].layers
    return [first.model_copy(update={"features": first.features[:1]}), second]


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"heatmap": None}, "`explain.heatmap`"),
        ({"layers": without_last_feature()}, "layer 0 lists only 1 of its features"),
        ({"target": "frog"}, "'frog' is not among the predictions; set a larger `top_k`"),
    ],
    ids=["heat map", "features", "target"],
)
def test_an_answer_that_lacks_something_is_refused_and_nothing_written(changes, missing, tmp_path):
    answer = make_answer()
    answer.explanations.append(make_answer(**changes).explanations[0])
    with pytest.raises(CircuitError, match=missing):
        write_graphs(tmp_path / "cat.json", answer, "cat.png", None, None, None)
    assert not list(tmp_path.iterdir())


def test_feature_numbers_are_cantors():
    assert [feature_number(*pair) for pair in [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (3, 0)]] == list(
        range(7)
    )
    assert feature_number(11, 49151) == sum(range(49163)) + 49151, "diagonal d holds d + 1 pairs"
    for layer in range(20):
        for index in range(20):
            number = feature_number(layer, index)
            diagonal = (math.isqrt(8 * number + 1) - 1) // 2  # the viewers' inverse
            second = number - diagonal * (diagonal + 1) // 2
            assert (diagonal - second, second) == (layer, index)


CARD = Card(
    layer=1,
    index=7,
    read_at="cls",
    frequency_cls=0.25,
    frequency_patches=0.125,
    quantiles=[1.0, 2.0, 3.0, 4.0, 5.0],
    largest=6.0,
    histogram=[3, *[0] * 14, 1],
    exemplars=[Exemplar(4, 6.0, bytes([0, 255, 51, 0, 0, 0])), Exemplar(9, 5.5, bytes(6))],
    mask_scale=0.5,
    mean_picture=None,
    label="fur",
    abstained=None,
    label_score=0.5,
    label_margin=0.25,
    label_clarity=0.5,
    label_auroc=0.75,
    writes="cat",
    writes_score=0.5,
    writes_margin=0.25,
    coactive=[],
)
TOKENS = ["[CLS]", "p(0,0)", "p(0,1)", "p(0,2)", "p(1,0)", "p(1,1)", "p(1,2)"]
LABELS = ["cat", "dog", "car", "tree", "frog"]


def test_details_of_a_feature_that_is_read_at_cls():
    details = as_json(feature_details(CARD, "sha256:abc/1", TOKENS, LABELS))
    check_schema(details, FEATURE)
    percentiles = details.pop("quantile_values")
    example = {"tokens": TOKENS, "train_token_ind": 0, "is_repeated_datapoint": False}
    assert details == {
        "transcoder_id": "sha256:abc/1",
        "index": 7,
        "examples_quantiles": [
            {
                "quantile_name": "Top activations",
                "examples": [
                    {**example, "tokens_acts_list": [6.0, 0, 0.5, 0.1, 0, 0, 0]},
                    {**example, "tokens_acts_list": [5.5, 0, 0, 0, 0, 0, 0]},
                ],
            }
        ],
        "top_logits": ["cat", "dog"],
        "bottom_logits": ["frog", "tree"],
        "act_min": 0,
        "act_max": 6,
        "histogram": CARD.histogram,
        "activation_frequency": 0.25,
    }
    assert len(percentiles) == 100
    assert [percentiles[place - 1] for place in (5, 25, 50, 75, 95, 100)] == pytest.approx([1, 2, 3, 4, 5, 6])
    assert percentiles[14] == pytest.approx(1.5)
    assert percentiles == sorted(percentiles)


def test_details_of_a_feature_that_is_read_at_patches():
    details = as_json(feature_details(replace(CARD, read_at="patches"), "", TOKENS, LABELS))
    check_schema(details, FEATURE)
    first, _ = details["examples_quantiles"][0]["examples"]
    assert (first["tokens"], first["tokens_acts_list"]) == (TOKENS[1:], [0, 0.5, 0.1, 0, 0, 0])
    assert first["train_token_ind"] == 1
    assert details["activation_frequency"] == 0.125


def test_details_of_a_feature_that_fires_below_zero():
    negative = replace(CARD, quantiles=[-5.0, -4.0, -3.0, -2.0, -1.0], exemplars=[Exemplar(0, -6.0, bytes(6))])
    details = feature_details(negative, "", TOKENS, LABELS)
    assert details.examples_quantiles[0]["examples"][0]["tokens_acts_list"][0] == 6
    assert details.quantile_values[0] == pytest.approx(-5.8)
    assert details.quantile_values == sorted(details.quantile_values)


def test_details_of_a_feature_that_never_fires():
    dead = replace(CARD, quantiles=[], largest=0.0, histogram=[], exemplars=[])
    details = as_json(feature_details(dead, "", TOKENS, ["cat"]))
    check_schema(details, FEATURE)
    # Neuronpedia reads the first group, whether there is one or not.
    assert details["examples_quantiles"] == [{"quantile_name": "Top activations", "examples": []}]
    assert (details["quantile_values"], details["top_logits"], details["bottom_logits"]) == ([], [], [])


def test_long_lists_of_labels_are_cut():
    details = feature_details(CARD, "", TOKENS, [str(place) for place in range(100)])
    assert details.top_logits == [str(place) for place in range(10)]
    assert details.bottom_logits == [str(place) for place in range(99, 89, -1)]


@pytest.fixture(scope="module")
def asked(carded, picture):
    """(answer, labels) of the bundle with cards, with two targets."""
    return ask(carded, picture(), targets=list(carded.manifest.text.labels[:2]))


def test_files_lie_where_the_viewer_looks(asked, carded, tmp_path):
    answer, labels = asked
    written = write_graphs(tmp_path / "new" / "cat.json", answer, "cat.png", carded, labels, carded.cards)
    assert [path.name for path in written] == ["cat.json", "cat-2.json"]
    served = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    for path, explanation in zip(written, answer.explanations, strict=True):
        assert path.read_bytes().endswith(b"}\n")
        graph = json.loads(path.read_text(encoding="utf-8"))
        check_schema(graph, GRAPH)
        metadata = graph["metadata"]
        assert (metadata["slug"], metadata["generation_settings"]["target"]) == (path.stem, explanation.target)
        assert metadata["scan"].startswith("custom-"), "or the viewer does not ask `transcoder_list`"
        features = [node for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder"]
        addresses = {f"{metadata['transcoder_list'][int(node['layer'])]}/{node['feature']}.json" for node in features}
        # The viewer's server serves the folder as ./data.
        assert {address.removeprefix("./data/") for address in addresses} | {"cat.json", "cat-2.json"} == served


def test_feature_files_are_the_cards(asked, carded, tmp_path):
    answer, labels = asked
    write_graphs(tmp_path / "cat.json", answer, "cat.png", carded, labels, carded.cards)
    assert sum(len(layer.features) for layer in answer.explanations[0].layers) > 3
    for layer in answer.explanations[0].layers:
        for feature in layer.features:
            text = (tmp_path / f"cat-features/{feature_number(layer.layer, feature.index)}.json").read_text("utf-8")
            assert text.endswith("}\n")
            file, card = json.loads(text), carded.cards.card(layer.layer, feature.index)
            check_schema(file, FEATURE)
            assert (file["index"], file["act_max"], file["histogram"]) == (card.index, card.largest, card.histogram)
            assert file["transcoder_id"] == f"{carded.digest}/{layer.layer}"
            (group,) = file["examples_quantiles"]
            assert len(group["examples"]) == len(card.exemplars)
            for example, exemplar in zip(group["examples"], card.exemplars, strict=True):
                assert len(example["tokens"]) == len(example["tokens_acts_list"])
                mask = np.frombuffer(exemplar.mask, np.uint8) / 255 * card.mask_scale
                assert example["tokens_acts_list"][-16:] == pytest.approx(mask.tolist(), rel=1e-3)
            effects = carded.directions[layer.layer, feature.index].astype(float) @ carded.fold @ labels.embeddings.T
            ranked = [labels.labels[place] for place in np.argsort(-effects)]
            half = len(ranked) // 2
            assert (file["top_logits"], file["bottom_logits"]) == (ranked[:half], ranked[::-1][:half])


def test_without_cards_there_are_no_feature_files(tmp_path):
    (tmp_path / "cat-features").mkdir()  # left by an earlier export, perhaps of another bundle
    (path,) = write_graphs(tmp_path / "cat.json", make_answer(), "cat.png", None, None, None)
    assert list((tmp_path / "cat-features").iterdir()) == []
    graph = json.loads(path.read_text(encoding="utf-8"))
    assert not any("cat-features" in address for address in graph["metadata"]["transcoder_list"])


@pytest.mark.parametrize("name", ["cat", "cat.txt", "my cat.json", "cät.json", ".json", "cat.json.gz"])
def test_names_that_the_viewers_do_not_find_are_refused(name, tmp_path):
    with pytest.raises(CircuitError, match=r"NAME\.json"):
        write_graphs(tmp_path / name, make_answer(), "cat.png", None, None, None)
    assert not list(tmp_path.iterdir())


# Circuits


@pytest.fixture(scope="module")
def circuit(carded, picture):
    async def run():
        async with Attributor(carded, Settings(bundle=carded.path)) as attributor:
            request = CircuitRequest(top_k=1000, nodes=60, seconds=60)
            return await answer_circuit(attributor, picture(), request, "test")

    return asyncio.run(run())


def test_a_circuit_has_the_links_between_features_and_the_errors(circuit):
    graph = as_json(circuit_graph(circuit, "cat.png", "cat", "./data/none"))
    check_schema(graph, GRAPH)
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) == len(circuit.nodes) + 1, "no id twice"
    assert {node["feature_type"] for node in nodes.values()} == TYPES
    assert len(graph["links"]) == len(circuit.edges)
    between = [
        (nodes[link["source"]], nodes[link["target"]])
        for link in graph["links"]
        if nodes[link["target"]]["feature_type"] == "cross layer transcoder"
    ]
    assert between
    for source, target in between:
        assert source["layer"] == "E" or int(source["layer"]) < int(target["layer"])
    (logit,) = (node for node in nodes.values() if node["is_target_logit"])
    assert circuit.target in logit["clerp"]
    into_logit = {link["source"]: link["weight"] for link in graph["links"] if link["target"] == logit["node_id"]}
    for node, given in zip(graph["nodes"], circuit.nodes, strict=False):
        assert (node["ctx_idx"], node["activation"]) == (given.token, given.activation)
        if node["node_id"] in into_logit:
            assert into_logit[node["node_id"]] == pytest.approx(given.contribution, abs=1e-5)
    assert len(graph["metadata"]["prompt_tokens"]) == 17
    shares = [node["influence"] for node in graph["nodes"][:-1]]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    inflow = graph["metadata"]["generation_settings"]["inflow"]
    totals = {node["node_id"]: node["activation"] for node in graph["nodes"] if node["activation"] is not None}
    assert inflow.keys() == {*totals, logit["node_id"]}
    for name, total in (totals | {logit["node_id"]: circuit.logit}).items():
        linked = sum(link["weight"] for link in graph["links"] if link["target"] == name)
        beside = (inflow[name][part] for part in ("unfollowed", "pruned", "constant"))
        assert linked + sum(beside) == pytest.approx(total, abs=1e-4)
