"""Residual SAEs in answers: features by layer, circuits, refusals by name, and what verify finds."""

import asyncio
import shutil

import numpy as np
import onnx
import pytest

from vitrine.models.bundle.bundle import BundleError
from vitrine.models.bundle.layout import RESIDUAL_TRACE, residual_file
from vitrine.models.bundle.sealing import seal
from vitrine.service.answers.answer_size import attribution_values
from vitrine.service.answers.attribute import answer_attribute
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.circuit import answer_circuit
from vitrine.service.answers.circuit_groups import grouped
from vitrine.service.answers.explain import check_explain
from vitrine.service.answers.features import card, card_dictionaries, search
from vitrine.service.answers.residual import circuit_dictionaries
from vitrine.service.engine.engine import Engine
from vitrine.service.errors import ServiceError
from vitrine.service.exports.account import circuit_page
from vitrine.service.exports.circuit_graph import circuit_graph
from vitrine.service.offline.verify import verify
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import AttributeRequest, Explain
from vitrine.service.schemas.base import Model
from vitrine.service.schemas.circuit import CircuitRequest
from vitrine.service.schemas.features import FeaturesQuery

ALL = {"dictionary": "residual", "nodes": 512, "seconds": 60, "node_share": 1, "edge_share": 1, "leaves": True}


def ask(bundle, image, *requests, **settings):
    """An answer to each request, from one attributor."""

    async def answers():
        async with Attributor(bundle, Settings(bundle=bundle.path, **settings)) as attributor:
            kinds = {CircuitRequest: answer_circuit, AttributeRequest: answer_attribute}
            return [await kinds[type(request)](attributor, image, request, "test") for request in requests]

    return asyncio.run(answers())


@pytest.fixture(scope="module")
def circuit(with_residual, picture):
    return ask(with_residual, picture(), CircuitRequest(**ALL))[0]


def test_what_flows_into_each_node_of_a_circuit_adds_up(circuit):
    def into(place, inflow):
        edges = sum(edge.weight for edge in circuit.edges if edge.target == place)
        return edges + inflow.unfollowed + inflow.pruned + inflow.constant

    assert circuit.dictionary == "residual"
    assert circuit.layers == 2
    assert into(None, circuit.inflow) == pytest.approx(circuit.logit, abs=1e-3)
    followed = [place for place, node in enumerate(circuit.nodes) if node.followed]
    assert {circuit.nodes[place].layer for place in followed} == {0, 1}
    for place in followed:
        node = circuit.nodes[place]
        assert into(place, node.inflow) == pytest.approx(node.activation, abs=1e-3)
    for edge in circuit.edges:  # one layer below, and below the first SAE embeddings
        target = 2 if edge.target is None else circuit.nodes[edge.target].layer
        source = circuit.nodes[edge.source]
        assert (source.layer, source.kind) == (target - 1, source.kind) if target else (None, "embedding")


def test_more_are_followed_than_of_a_clt_unless_less_is_allowed(with_residual, picture):
    asked = CircuitRequest(dictionary="residual", seconds=60)
    (answer,) = ask(with_residual, picture(), asked)
    assert answer.followed > 4 * 10
    (answer,) = ask(with_residual, picture(), asked, max_circuit_nodes=10)
    assert answer.followed == 4 * 10
    with pytest.raises(ServiceError, match="`nodes` is 41; at most 40 features are followed back"):
        ask(with_residual, picture(), CircuitRequest(dictionary="residual", nodes=41), max_circuit_nodes=10)


def test_a_circuit_can_be_taken_along(circuit, with_residual, picture):
    graph = circuit_graph(circuit, "photo.png", "photo", "./data/none")
    assert "the MLPs' gates" in graph.metadata.info["description"]
    assert len(graph.metadata.transcoder_list) == 2
    assert any(node.clerp.startswith("Err: stream after block 1") for node in graph.nodes)
    groups = grouped(circuit)
    assert groups.dictionary == "residual"
    assert '"dictionary": "residual"' in circuit_page(with_residual, [groups], 20, picture())


def test_features_by_layer_are_the_traces(with_residual, picture):
    explains = ({"residual": True, "features": 3}, {}, {"residual": True, "features": 100})
    requests = [AttributeRequest(explain=explain) for explain in explains]
    asked, plain, whole = ask(with_residual, picture(), *requests)
    assert plain.residual is None
    found = asked.residual
    assert "residual" in asked.timings_ms
    assert "residual" not in plain.timings_ms
    assert [layer.layer for layer in found.layers] == [0, 1]
    assert (found.rows, found.columns) == (4, 4)
    expected = attribution_values(with_residual.manifest, requests[2], 3)
    expected -= attribution_values(with_residual.manifest, AttributeRequest(explain={"features": 100}), 3)
    active = [len(layer.cls) * 4 + len(layer.patches) * (16 + 4) for layer in whole.residual.layers]
    assert 0 < sum(active) <= expected <= 2 * sum(active)
    for layer, budget in zip(found.layers, (5, 6), strict=True):
        assert 0 < len(layer.cls) <= 3
        assert layer.active_cls <= budget
        for features in (layer.cls, layer.patches):
            sizes = [abs(feature.activation) for feature in features]
            assert sizes == sorted(sizes, reverse=True)
        for feature in layer.patches:
            assert len(feature.tokens) == 16
            assert feature.activation == max(feature.tokens, key=abs)


def test_features_are_those_most_active(with_residual, make_pixels):
    engine = Engine(with_residual, Settings(bundle=with_residual.path))
    pixels = make_pixels(1, seed=3).numpy()[0]
    trace, (parts,) = engine.residual.trace(pixels), engine.explain(pixels[None])
    np.testing.assert_allclose(trace.embedding, parts.embedding, atol=1e-5)
    assert circuit_dictionaries(engine) == ["clt", "residual"]


def test_a_bundle_without_them_says_so(engine, with_residual):
    unloaded = Engine(with_residual, Settings(bundle=with_residual.path, residual=False, sources=False))
    for served, said in ((engine, "exported without them"), (unloaded, "VITRINE_RESIDUAL=false")):
        assert "residual" not in circuit_dictionaries(served)
        with pytest.raises(ServiceError, match=f"`explain.residual` needs residual SAEs in the bundle 'tiny'.*{said}"):
            check_explain(Explain(residual=True), ("cat",), 10, served)


def test_features_are_named_as_their_cards_do(carded_residual, picture):
    requests = (AttributeRequest(explain={"residual": True, "features": 100}), CircuitRequest(**ALL))
    answer, circuit = ask(carded_residual, picture(), *requests)
    cards, named = carded_residual.residual_cards, 0
    for layer in answer.residual.layers:
        for feature in (*layer.cls, *layer.patches):
            assert (feature.label, feature.label_score) == cards.label(layer.layer, feature.index)
            named += feature.label is not None
    assert named
    found = [node for node in circuit.nodes if node.kind == "feature"]
    assert [(node.label, node.label_score) for node in found] == [cards.label(one.layer, one.index) for one in found]
    labels = [node.label for node in found if node.label]
    assert labels
    groups = grouped(circuit)
    assert {group.label for group in groups.groups if group.label} == set(labels)
    graph = circuit_graph(circuit, "photo.png", "photo", "./data/none")
    assert {node.clerp for node in graph.nodes} >= set(labels)
    first = next(group for group in groups.groups if group.kind == "feature")
    assert f'"residual/{first.layer}/{first.index}": {{"model"' in circuit_page(
        carded_residual, [groups], 20, picture()
    )


def test_their_cards_are_asked_for_by_dictionary(carded_residual, with_residual):
    model, cards = Model(name="tiny", digest=carded_residual.digest), carded_residual.residual_cards
    assert card_dictionaries(carded_residual) == ["residual"]
    assert card_dictionaries(with_residual) == []
    best = cards.search(None, None, 0, 3)[1]
    found = search(carded_residual, model, FeaturesQuery(dictionary="residual", limit=3))
    assert [(line.layer, line.index, line.label) for line in found.features] == [
        (line.layer, line.index, line.label) for line in best
    ]
    assert "dictionary=residual" in found.next
    one = card(carded_residual, model, "residual", best[0].layer, best[0].index)
    assert (one.dictionary, one.label, len(one.exemplars)) == ("residual", best[0].label, 3)
    for bundle, asked, code, said in (
        (carded_residual, ("residual", 2, 0), "not_found", "there is no layer 2; the layers are 0 to 1"),
        (carded_residual, ("residual", 0, 48), "not_found", "layer 0 has no feature 48; its features are 0 to 47"),
        (carded_residual, ("clt", 0, 0), "no_cards", "has no feature cards"),
        (with_residual, ("residual", 0, 0), "no_cards", "has no cards of its residual SAEs' features"),
    ):
        with pytest.raises(ServiceError, match=said) as refused:
            card(bundle, model, *asked)
        assert refused.value.code == code


def test_verify_counts_the_labels_of_their_cards(carded_residual, tmp_path):
    summary = carded_residual.manifest.residual_cards
    wrong = summary.model_copy(update={"quality": summary.quality.model_copy(update={"labelled": 1})})
    copy = shutil.copytree(carded_residual.path, tmp_path / "copy")
    seal(copy, carded_residual.manifest.model_copy(update={"residual_cards": wrong}))
    with pytest.raises(BundleError, match=r"residual_cards: \d+ cards have a label, but the manifest says 1"):
        verify(copy)


def test_verify_notices_graphs_that_do_not_belong_together(with_residual, tmp_path):
    verify(with_residual.path)
    for file, said in ((RESIDUAL_TRACE, "embedding"), (residual_file(1), "accounts by residual SAEs differ")):
        copy = shutil.copytree(with_residual.path, tmp_path / file)
        model = onnx.load(copy / file, load_external_data=False)
        names = ("tower.visual.ln_post.bias", "biases")
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name in names]
        values = onnx.numpy_helper.to_array(tensor) + 0.1
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        (copy / file).write_bytes(model.SerializeToString())
        seal(copy, with_residual.manifest)
        with pytest.raises(BundleError, match=said):
            verify(copy)
