"""Circuits of the residual replacement model: of many images, and of one by its graph, against relevance."""

import numpy as np
import pytest
import torch

from libragrad import in_float64
from vitrine.models.account.residual import ResidualTrace, feature_accounts, logit_accounts
from vitrine.models.account.walk import walk_trace
from vitrine.models.graph.gated_trace import GatedTraceGraph
from vitrine.models.graph.residual import FeatureSourcesGraph, LogitSourcesGraph
from vitrine.training.evaluation.relevance import Kept, Relevance
from vitrine.training.evaluation.residual_circuit import residual_circuit

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def deep(make_clip, make_saes):
    """(tower of four blocks, its SAEs) in float64."""
    clip = make_clip(vision_cfg={"layers": 4})
    return in_float64(clip), make_saes(clip).double()


@pytest.fixture(scope="module")
def images(deep, make_pixels):
    """Two batches, of two and of one image."""
    generator = torch.Generator().manual_seed(2)
    pixels = make_pixels(3, seed=7).double()
    directions = 10 * torch.randn(3, deep[0].embedding, generator=generator, dtype=torch.float64)
    return [(pixels[:2], directions[:2]), (pixels[2:], directions[2:])]


@pytest.mark.parametrize("leaf_error", [False, True])
def test_relevance_is_what_flows_through_the_kept(deep, images, leaf_error):
    relevance = Relevance(*deep, leaf_error=leaf_error)
    circuit = residual_circuit(relevance, images, 0.5)
    assert [of_layer.layer for of_layer in circuit] == [2, 1, 0]
    together = torch.cat([pixels for pixels, _ in images]), torch.cat([directions for _, directions in images])
    walk = relevance.walk(*together)
    for of_layer in circuit:
        nodes = walk.relevance().nodes.mean(0)
        torch.testing.assert_close(torch.from_numpy(of_layer.relevance), nodes[of_layer.nodes], **CLOSE)
        assert (of_layer.relevance > 0).all()
        assert set(of_layer.nodes) == set(nodes.argsort(descending=True)[: len(of_layer.nodes)].tolist())
        np.testing.assert_allclose(of_layer.edges.sum(0), of_layer.relevance, rtol=1e-9)
        assert of_layer.share == pytest.approx(float(nodes[of_layer.nodes].sum() / nodes.clamp_min(0).sum()))
        mask = torch.zeros(len(nodes), dtype=torch.bool)
        mask[of_layer.nodes] = True
        walk.back(Kept(mask[:-1], bool(mask[-1])))


def test_plain_relevance_is_that_of_the_whole_pass(deep, images):
    relevance = Relevance(*deep)
    circuit = residual_circuit(relevance, images, 0.5, hierarchical=False)
    whole = zip(*(list(relevance(*batch)) for batch in images), strict=True)
    for of_layer, parts in zip(circuit, whole, strict=True):
        nodes = torch.cat([part.nodes for part in parts]).mean(0)
        torch.testing.assert_close(torch.from_numpy(of_layer.relevance), nodes[of_layer.nodes], **CLOSE)
    assert circuit[1].edges.shape == (len(circuit[0].nodes), len(circuit[1].nodes))


def test_a_tower_of_one_layer_has_no_circuit(make_clip, make_saes, make_pixels):
    clip = make_clip(vision_cfg={"layers": 1})
    relevance = Relevance(clip.tower, make_saes(clip))
    assert residual_circuit(relevance, [(make_pixels(1), torch.ones(clip.tower.embedding))], 0.5) == []


def test_a_graph_walked_is_relevance_by_token(deep, images):
    """Its accounts, feature by feature, against one pass back through all that was kept."""
    tower, saes = deep
    pixels, direction = images[1]
    names = ("embedding", "scale", "norm", "attention_weights", "before_attention", "before_mlp", "gates", "streams")
    outputs = [part.numpy() for part in GatedTraceGraph(tower, saes)(pixels)]
    trace = ResidualTrace.from_batch(dict(zip((*names, "deviations", "indices", "values"), outputs, strict=True)), 0)

    def run(graph, *inputs):
        return [part.numpy() for part in graph(*(torch.as_tensor(part) for part in inputs))]

    def follow(wanted):
        layer = int(wanted.layers[0])
        inputs = (wanted.indices, wanted.tokens, trace.deviations[layer], *trace.through(layer))
        return feature_accounts(trace, layer, run(FeatureSourcesGraph(tower, saes, layer), *inputs), wanted.activations)

    fold, beta = (part.numpy() for part in tower._fold64())
    start = trace.starts(direction.numpy(), fold, 1.0)
    outputs = run(LogitSourcesGraph(tower, saes), start, *trace.through(3))
    (target,) = logit_accounts(trace, outputs, direction.numpy(), beta, 1.0)
    circuit = walk_trace(trace, target, follow, 0.6)
    walk = Relevance(tower, saes, leaf_error=True).walk(pixels, direction)
    assert abs(target.remainder) < 1e-9
    assert target.logit == pytest.approx(float(walk.logits[0]))
    assert [of_layer.layer for of_layer in circuit] == [2, 1, 0]
    places = trace.values.shape[1] * trace.values.shape[2]
    for of_layer in circuit:
        found = walk.relevance()
        features, errors = found.features[0], found.errors[0]
        kept = torch.zeros_like(features, dtype=torch.bool)
        for node, relevance in zip(of_layer.nodes, of_layer.relevance, strict=True):
            if node < places:
                token, feature = node // trace.values.shape[2], trace.indices[of_layer.layer].ravel()[node]
                kept[token, feature] = True
                assert relevance == pytest.approx(float(features[token, feature]), rel=1e-8)
            else:
                assert relevance == pytest.approx(float(errors[node - places]), rel=1e-8)
        positive = torch.cat([features.flatten(), errors]).clamp_min(0).sum()
        assert of_layer.share == pytest.approx(float(of_layer.relevance.sum() / positive))
        walk.back(Kept(kept, False))
