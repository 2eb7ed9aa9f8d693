"""Attribution graphs: against dense algebra over all paths, and on a small network made by hand."""

from itertools import count

import numpy as np
import pytest

from vitrine.models.account import circuit
from vitrine.models.account.circuit import Limits, expand
from vitrine.models.account.edges import Shape
from vitrine.models.account.pruning import prune
from vitrine.models.account.sources import Sources, Trace

LAYERS, TOKENS, PLACES = 3, 2, 2
SHAPE = Shape(LAYERS, TOKENS, PLACES)
FEATURES, COLUMNS = 12, 12 + 2 + 6


class Network:
    """Random edges from every column into features of later layers, and into the target."""

    def __init__(self, seed=0):
        generator = np.random.default_rng(seed)
        self.edges = generator.normal(size=(FEATURES, COLUMNS)) * (generator.random((FEATURES, COLUMNS)) < 0.7)
        layer = np.concatenate(
            [np.repeat(np.arange(LAYERS), TOKENS * PLACES), [-1] * TOKENS, np.repeat(range(3), TOKENS)]
        )
        # from features and errors of earlier layers alone; what block l's MLP wrote is read from block l + 1 on
        self.edges[np.repeat(np.arange(LAYERS), TOKENS * PLACES)[:, None] <= layer] = 0
        self.values = generator.uniform(1, 2, FEATURES)
        self.values[5] = 0  # an unused place
        self.edges[:, 5] = 0
        self.target = generator.normal(size=COLUMNS)
        self.target[5] = 0
        self.asked = []

    @property
    def trace(self):
        shape = (LAYERS, TOKENS, PLACES)
        indices = np.arange(FEATURES).reshape(shape) + 100
        return Trace(*[None] * 2, 1.0, *[None] * 5, indices=indices, values=self.values.reshape(shape))

    def account(self, edges, total):
        features, embeddings, errors = np.split(edges, [FEATURES, FEATURES + TOKENS])
        return Sources(
            total,
            embeddings,
            features.reshape(LAYERS, TOKENS, PLACES),
            np.zeros(LAYERS),
            errors.reshape(LAYERS, TOKENS),
            0.0,
            self.trace.indices,
        )

    def follow(self, wanted):
        columns = wanted.indices - 100
        assert (SHAPE.layer_of(columns) == wanted.layers).all()
        assert (SHAPE.token_of(columns) == wanted.tokens).all()
        assert (self.values[columns] == wanted.activations).all()
        self.asked.extend(columns.tolist())
        return [self.account(self.edges[column], self.values[column]) for column in columns]

    def graph(self, nodes=FEATURES, **limits):
        limits = {"seconds": 60.0, "left_out": 0.0} | limits
        return expand(self.trace, self.account(self.target, 1.0), self.follow, Limits(nodes, **limits))


def normalised(edges):
    sums = np.abs(edges).sum(-1, keepdims=True)
    return np.divide(np.abs(edges), sums, out=np.zeros_like(edges), where=sums != 0)


def all_paths(network, expanded):
    """Influence by the inverse: the target's row of (I - A)^-1 - I, with the target as the last node."""
    matrix = np.zeros((COLUMNS + 1, COLUMNS + 1))
    matrix[expanded, :COLUMNS] = normalised(network.edges)[expanded]
    matrix[-1, :COLUMNS] = normalised(network.target)
    return (np.linalg.inv(np.eye(COLUMNS + 1) - matrix) - np.eye(COLUMNS + 1))[-1, :COLUMNS]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("nodes", [3, 7, FEATURES])
def test_influence_is_that_over_all_paths(seed, nodes):
    network = Network(seed)
    graph = network.graph(nodes)
    influence = graph.influence
    np.testing.assert_allclose(influence, all_paths(network, graph.expanded), atol=1e-6)
    edges = graph.edges(np.arange(len(graph.expanded)), np.arange(COLUMNS))
    np.testing.assert_allclose(edges, network.edges[graph.expanded], atol=1e-6)
    for layer, rows in graph.rows.items():  # hold what is below them
        assert rows.shares.shape == (len(rows.numbers), layer * TOKENS * (PLACES + 1) + TOKENS)
    leaves = graph.leaves
    assert leaves.embeddings + leaves.errors + leaves.left_out + leaves.constant == pytest.approx(1)
    assert leaves.left_out == pytest.approx(
        sum(influence[column] for column in range(FEATURES) if column not in graph.expanded), abs=1e-6
    )


def test_influences_are_computed_anew_when_a_share_more_is_expanded(monkeypatch):
    ranked, rank = [], circuit.Expansion._most_influential
    monkeypatch.setattr(circuit, "BATCH", 1)
    monkeypatch.setattr(circuit, "ANEW", 2)
    monkeypatch.setattr(
        circuit.Expansion, "_most_influential", lambda self, most: ranked.append(most) or rank(self, most)
    )
    network = Network(0)
    graph = network.graph(9)
    assert ranked == [1, 1, 1, 1, 2, 3]  # at 0, 1, 2, 3, 4 and 6 expanded features
    assert network.asked == graph.expanded.tolist()
    assert len(set(network.asked)) == 9
    np.testing.assert_allclose(graph.influence, all_paths(network, graph.expanded), atol=1e-6)


def test_scores_are_circuit_tracers():
    """Its formulas, on the whole graph as one adjacency matrix [target last]."""
    network = Network(3)
    graph = network.graph()
    influence = graph.influence
    matrix = np.zeros((COLUMNS + 1, COLUMNS + 1))
    matrix[graph.expanded, :COLUMNS] = normalised(network.edges)[graph.expanded]
    matrix[-1, :COLUMNS] = normalised(network.target)
    weights, errors = np.zeros(COLUMNS + 1), slice(FEATURES + TOKENS, COLUMNS)
    weights[-1] = 1
    node = np.append(influence, 0)
    replacement = node[FEATURES : FEATURES + TOKENS].sum()
    assert graph.leaves.replacement == pytest.approx(replacement / (replacement + node[errors].sum()), abs=1e-6)
    output = np.zeros(COLUMNS + 1)
    rows = [*graph.expanded, COLUMNS]  # leaves have nothing flowing in
    output[rows] = (node + weights)[rows]
    expected = ((1 - matrix[:, errors].sum(-1)) * output).sum() / output.sum()
    assert graph.completeness == pytest.approx(expected, abs=1e-6)


def test_the_most_influential_are_expanded_first_and_unused_places_never(monkeypatch):
    monkeypatch.setattr("vitrine.models.account.circuit.BATCH", 1)
    network = Network(1)
    network.graph()
    assert len(set(network.asked)) == len(network.asked) == FEATURES - 1
    assert 5 not in network.asked
    for done, column in enumerate(network.asked):
        influence = all_paths(network, network.asked[:done])[:FEATURES]
        influence[network.asked[:done]] = 0
        influence[5] = 0
        assert column == influence.argmax()


def test_the_budget_is_kept(monkeypatch):
    network = Network()
    assert len(network.graph(nodes=4).expanded) == 4
    assert network.graph(nodes=0).leaves.left_out > 0.3
    monkeypatch.setattr("vitrine.models.account.circuit.BATCH", 2)
    whole = network.graph().influence
    enough = network.graph(left_out=0.2)
    assert enough.leaves.left_out <= 0.2
    assert len(enough.expanded) < FEATURES - 1
    assert whole.shape == (COLUMNS,)
    ticks = count()
    monkeypatch.setattr("vitrine.models.account.circuit.perf_counter", lambda: next(ticks))
    assert len(network.graph(seconds=2.5).expanded) == 4  # two batches, at 1 and 2 seconds


def test_pruning_keeps_the_shares_asked_for_and_nothing_that_hangs_loose():
    network = Network(2)
    graph = network.graph()
    influence = graph.influence
    everything = prune(graph, 1.0, 1.0)
    assert set(everything.nodes) == set(np.flatnonzero(influence))
    assert len(everything.weights) == np.count_nonzero(network.target) + np.count_nonzero(network.edges[graph.expanded])
    for source, target, weight in zip(everything.sources, everything.targets, everything.weights, strict=True):
        into = network.target if target == -1 else network.edges[everything.nodes[target]]
        assert weight == pytest.approx(into[everything.nodes[source]], abs=1e-5)
    pruned = prune(graph, 0.6, 0.8)
    order = np.sort(influence)[::-1]
    fewest = int(np.searchsorted(np.cumsum(order), 0.6 * order.sum())) + 1
    assert len(pruned.nodes) <= fewest
    assert set(pruned.nodes) <= set(np.argsort(-influence)[:fewest])
    assert 0 < len(pruned.weights) < len(everything.weights)
    assert set(pruned.sources) == set(range(len(pruned.nodes))), "every node leads on"
    expanded = {place for place, column in enumerate(pruned.nodes) if column in graph.expanded}
    made = {place for place in expanded if network.edges[pruned.nodes[place]].any()}
    assert made <= set(pruned.targets), "every feature that was expanded is made by something"
    assert (np.diff(pruned.influence) <= 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_few_edges_leave_only_nodes_that_they_join(seed):
    graph = Network(seed).graph()
    pruned = prune(graph, 0.9, 0.3)
    assert set(pruned.sources) == set(range(len(pruned.nodes)))
    assert len(pruned.nodes) < len(prune(graph, 0.9, 1.0).nodes)


def test_a_chain_by_hand():
    """Embedding 0 makes feature 0 (layer 0), which with an error makes feature 4 (layer 1), which makes the target."""
    network = Network()
    network.edges[:] = 0
    network.target[:] = 0
    network.target[4] = -2.0
    network.edges[4, [0, 14]] = [3.0, -1.0]
    network.edges[0, 12] = 0.5
    graph = network.graph()
    influence = graph.influence
    assert influence[[4, 0, 14, 12]] == pytest.approx([1, 0.75, 0.25, 0.75])
    leaves = graph.leaves
    assert (leaves.embeddings, leaves.errors, leaves.left_out) == pytest.approx((0.75, 0.25, 0))
    assert leaves.replacement == pytest.approx(0.75)
    assert graph.completeness == pytest.approx((1 + 0.75 * 1 + 0.75) / (1 + 1 + 0.75))
    circuit = prune(graph, 0.95, 0.98)
    names = [int(column) for column in circuit.nodes]
    edges = {
        (names[source], None if target == -1 else names[target]): weight
        for source, target, weight in zip(circuit.sources, circuit.targets, circuit.weights, strict=True)
    }
    assert edges == pytest.approx({(4, None): -2.0, (0, 4): 3.0, (14, 4): -1.0, (12, 0): 0.5})


@pytest.mark.parametrize("seed", range(4))
def test_edges_are_kept_by_their_share_and_their_targets_influence(seed):
    """circuit-tracer's edge score, with all nodes kept: |edge| / sum of |edges| into its target, times that one's
    influence."""
    network = Network(seed)
    graph = network.graph()
    influence = graph.influence
    scores = {(column, None): share for column, share in enumerate(normalised(network.target))}
    for row in graph.expanded.tolist():
        of_row = normalised(network.edges)[row] * influence[row]
        scores |= {(column, row): score for column, score in enumerate(of_row)}
    ranked = sorted(scores, key=lambda edge: -scores[edge])
    cumulated = np.cumsum([scores[edge] for edge in ranked])
    fewest = set(ranked[: int(np.searchsorted(cumulated, 0.5 * cumulated[-1])) + 1])
    circuit = prune(graph, 1.0, 0.5)
    names = circuit.nodes.tolist()
    found = {
        (names[source], None if target < 0 else names[target])
        for source, target in zip(circuit.sources, circuit.targets, strict=True)
    }
    assert found <= fewest
    straight = {(column, target) for column, target in fewest if column >= FEATURES and target is None}
    assert straight <= found, "of a leaf and the target nothing else can hang loose"
    assert straight


def test_a_target_that_nothing_makes_has_an_empty_circuit():
    """A logit minus itself."""
    network = Network()
    network.target[:] = 0
    graph = network.graph()
    assert len(graph.expanded) == 0
    circuit = prune(graph)
    assert len(circuit.nodes) == len(circuit.weights) == 0
    leaves = graph.leaves
    assert (leaves.embeddings, leaves.errors, leaves.left_out, leaves.replacement) == (0, 0, 0, 1)
    assert graph.completeness == 1


def flows(network, circuit, column):
    """(listed edges by source, all edges) into a column of the circuit, or into the target (None)."""
    place = -1 if column is None else circuit.nodes.tolist().index(column)
    into = circuit.targets == place
    listed = dict(zip(circuit.nodes[circuit.sources[into]].tolist(), circuit.weights[into].tolist(), strict=True))
    return listed, network.target if column is None else network.edges[column]


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_what_flows_in_adds_up_whatever_is_listed(seed, leaves, monkeypatch):
    monkeypatch.setattr("vitrine.models.account.circuit.BATCH", 1)
    network = Network(seed)
    graph = network.graph(nodes=5)
    circuit = prune(graph, 0.7, 0.8, leaves=leaves)
    waiting = np.setdiff1d(np.arange(FEATURES), graph.expanded)
    others = np.setdiff1d(np.arange(COLUMNS), waiting)
    inflow = circuit.inflow
    expanded = [column for column in circuit.nodes.tolist() if column in graph.expanded]
    assert expanded
    places = {column: place for place, column in enumerate(circuit.nodes.tolist())} | {None: -1}
    for column in [*expanded, None]:
        listed, edges = flows(network, circuit, column)
        rest = edges.copy()
        rest[list(listed)] = 0
        gross, place = np.abs(edges).sum() or 1, places[column]
        assert inflow.edges[place] == pytest.approx(edges.sum(), abs=1e-5)
        for signed, share, columns in (
            (inflow.unfollowed, inflow.unfollowed_share, waiting),
            (inflow.pruned, inflow.pruned_share, others),
        ):
            assert signed[place] == pytest.approx(rest[columns].sum(), abs=1e-5)
            assert share[place] == pytest.approx(np.abs(rest[columns]).sum() / gross, abs=1e-5)
    leaf = [place for column, place in places.items() if column is not None and column not in expanded]
    assert np.isnan(inflow.edges[leaf]).all()
    assert len(inflow.edges) == len(circuit.nodes) + 1


def test_features_that_were_not_followed_are_nodes_on_request_alone():
    network = Network(1)
    graph = network.graph(nodes=3, left_out=0.0)
    assert graph.leaves.left_out > 0.2
    waiting = set(range(FEATURES)) - set(graph.expanded.tolist())
    listed = prune(graph, 0.8, 1.0)
    assert not waiting & set(listed.nodes.tolist())
    assert waiting & set(prune(graph, 0.8, 1.0, leaves=True).nodes.tolist())
    influence = graph.influence.copy()
    influence[list(waiting)] = 0
    order = np.argsort(-influence)
    fewest = int(np.searchsorted(np.cumsum(influence[order]), 0.8 * influence.sum())) + 1
    assert set(listed.nodes) == set(order[:fewest]), "the share is of the influence of what may be listed"
    np.testing.assert_allclose(listed.influence, graph.influence[listed.nodes])


def test_a_feature_that_others_made_which_were_not_followed_stays():
    """Feature 4 makes the target, feature 0 makes it; 0 is not followed."""
    network = Network()
    network.edges[:] = 0
    network.target[:] = 0
    network.target[4] = 2.0
    network.edges[4, 0] = 1.5
    graph = network.graph(nodes=1)
    assert graph.expanded.tolist() == [4]
    circuit = prune(graph)
    assert circuit.nodes.tolist() == [4]
    assert circuit.inflow.unfollowed == pytest.approx([1.5, 0])
    assert circuit.inflow.unfollowed_share == pytest.approx([1, 0])
    assert set(prune(graph, leaves=True).nodes) == {4, 0}
