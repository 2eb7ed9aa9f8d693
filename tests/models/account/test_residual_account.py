"""Circuits by residual SAEs, from the graphs in torch to a pruned circuit: every inflow adds up."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitrine.models.account.circuit import Limits, expand
from vitrine.models.account.pruning import prune
from vitrine.models.account.residual import ResidualTrace, feature_accounts, logit_accounts, whole_accounts
from vitrine.models.graph.gated import GatedSourcesGraph
from vitrine.models.graph.gated_trace import GatedTraceGraph
from vitrine.models.graph.residual import FeatureSourcesGraph, LogitSourcesGraph

NAMES = (
    *("embedding", "scale", "norm", "attention_weights", "before_attention", "before_mlp", "gates", "streams"),
    *("deviations", "indices", "values"),
)


class Image:
    """One image, its trace in numpy, and the graphs that follow it back."""

    def __init__(self, clip, saes, pixels):
        self.tower, self.saes = clip.tower, saes
        outputs = GatedTraceGraph(clip.tower, saes)(pixels)
        named = dict(zip(NAMES, (part.numpy() for part in outputs), strict=False))
        self.trace = ResidualTrace.from_batch(named, 0)
        self.fold, self.beta = (part.numpy() for part in clip.tower.fold())
        labels = torch.randn(2, clip.tower.embedding, generator=torch.Generator().manual_seed(1))
        self.directions = F.normalize(labels, dim=-1).numpy()
        self.starts = self.trace.starts(self.directions, self.fold, 100.0)

    def run(self, graph, *inputs):
        return [part.numpy() for part in graph(*(torch.from_numpy(np.asarray(part)) for part in inputs))]

    def logits(self):
        block = self.tower.layers - 1
        outputs = self.run(LogitSourcesGraph(self.tower, self.saes), self.starts, *self.trace.through(block))
        return logit_accounts(self.trace, outputs, self.directions, self.beta, 100.0)

    def follow(self, wanted):
        """Layer by layer, in the order that was asked for."""
        accounts = [None] * len(wanted.layers)
        for layer in np.unique(wanted.layers).tolist():
            places = np.flatnonzero(wanted.layers == layer)
            graph = FeatureSourcesGraph(self.tower, self.saes, layer)
            inputs = (wanted.indices[places], wanted.tokens[places], self.trace.deviations[layer])
            outputs = self.run(graph, *inputs, *self.trace.through(layer))
            found = feature_accounts(self.trace, layer, outputs, wanted.activations[places])
            for place, account in zip(places, found, strict=True):
                accounts[place] = account
        return accounts


def test_a_whole_circuit_adds_up(make_clip, make_saes, make_pixels):
    clip = make_clip(vision_cfg={"layers": 4})
    image = Image(clip, make_saes(clip), make_pixels(1, seed=3))
    target = image.logits()[0]
    assert target.first == 2
    assert target.logit == pytest.approx(100 * float(image.directions[0] @ image.trace.embedding))
    followed = []

    def follow(wanted):
        accounts = image.follow(wanted)
        followed.extend(zip(wanted.layers.tolist(), accounts, strict=True))
        return accounts

    graph = expand(image.trace, target, follow, Limits(10_000, 60, left_out=0))
    active = np.flatnonzero(image.trace.values.ravel())
    assert set(graph.expanded) <= set(active)
    assert len(graph.expanded) > 0.9 * len(active)
    for layer, account in [(3, target), *followed]:
        assert abs(account.remainder) < 1e-4 * max(1, abs(account.logit))
        assert account.first == max(layer - 1, 0)
        assert account.errors.shape[0] == min(layer, 1)
        assert account.embeddings.any() == (layer == 0)
    leaves = graph.leaves
    assert leaves.embeddings + leaves.errors + leaves.left_out + leaves.constant == pytest.approx(1, abs=1e-5)
    assert min(leaves.embeddings, leaves.errors) > 0.01
    # rows hold the layer below alone
    shape = graph.shape
    places = shape.tokens * shape.places
    assert {layer: rows.shares.shape[1] for layer, rows in graph.rows.items()} == {
        layer: min(layer, 1) * (places + shape.tokens) + shape.tokens for layer in range(3)
    }
    for layer, rows in graph.rows.items():
        edges = graph.edges(rows.numbers, np.arange(shape.columns))
        sources = np.flatnonzero(edges.any(0))
        assert set(shape.layer_of(sources[sources < shape.features])) == ({layer - 1} if layer else set())
        assert ((sources < shape.features) | (sources >= shape.errors)).all() == (layer > 0)
    circuit = prune(graph)
    into = circuit.targets == -1
    assert into.any()
    listed = circuit.weights[into].sum() + circuit.inflow.unfollowed[-1] + circuit.inflow.pruned[-1]
    assert listed == pytest.approx(target.logit - target.constants - target.biases.sum(), rel=1e-4, abs=1e-4)
    assert set(circuit.targets) - {-1} <= set(np.flatnonzero(np.isin(circuit.nodes, graph.expanded)))


def test_a_tower_of_one_layer_has_embeddings_alone(make_clip, make_saes, make_pixels):
    clip = make_clip(vision_cfg={"layers": 1})
    image = Image(clip, make_saes(clip), make_pixels(1, seed=3))
    assert image.trace.indices is None
    for account in image.logits():
        assert abs(account.remainder) < 1e-4
        assert account.features.size == account.errors.size == 0


def test_an_account_through_all_blocks_needs_no_saes(clip, make_pixels):
    image = Image(clip, None, make_pixels(1, seed=4))
    trace = image.trace
    held = (trace.weights, trace.before_attention, trace.before_mlp, trace.gates, trace.streams)
    outputs = image.run(GatedSourcesGraph(clip.tower), image.starts, *held)
    for account in whole_accounts(trace, outputs, image.directions, image.beta, 100.0):
        assert abs(account.remainder) < 1e-3
        assert account.features.size == account.errors.size == 0
        assert account.map.shape == (clip.tower.tokens,)
