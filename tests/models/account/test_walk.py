"""The paper's pruning by hand: clamped, by share, from the logit down."""

import numpy as np
import pytest

from vitrine.models.account.walk import walk

OF_LOGIT = np.array([[4.0, -9.0, 1.0, 3.0]])
INTO = {0: [2.0, 1.0, -1.0], 3: [1.0, -2.0, 0.5], 2: [0.0, 0.0, 8.0]}  # edges into nodes of layer 1, from those of 0


def into(layer, nodes, relevance):
    assert layer == 1
    np.testing.assert_array_equal(relevance, OF_LOGIT[0, nodes])
    return np.array([INTO[node] for node in nodes]), None


def test_the_fewest_nodes_whose_share_of_what_is_positive_is_enough():
    last, first = walk(1, OF_LOGIT, into, 0.7)
    assert (last.layer, first.layer) == (1, 0)
    assert last.nodes.tolist() == [0, 3]
    assert last.relevance.tolist() == [4, 3]
    assert last.share == pytest.approx(7 / 8)
    assert last.edges.tolist() == [[4, 3]]
    assert first.nodes.tolist() == [0], "3 of 3: the sums of edges into 0 and 3 are 3, -1, -.5"
    assert first.edges.tolist() == [[2], [1]]
    assert walk(1, OF_LOGIT, into, 0.4)[0].nodes.tolist() == [0]
    assert walk(1, OF_LOGIT, into, 1.0)[0].nodes.tolist() == [0, 3, 2]


def test_no_more_nodes_than_asked_for():
    last, first = walk(1, OF_LOGIT, into, 1.0, most=1)
    assert last.nodes.tolist() == [0]
    assert last.share == pytest.approx(4 / 8)
    assert first.edges.tolist() == [[2]]


def test_relevances_of_their_own_are_ranked_and_edges_told():
    _, first = walk(1, OF_LOGIT, lambda *kept: (into(*kept)[0], np.array([0.0, 5.0, 0.0])), 0.7)
    assert first.nodes.tolist() == [1]
    assert first.relevance.tolist() == [5]
    assert first.edges.tolist() == [[1], [-2]]


def test_a_logit_that_nothing_speaks_for_ends_the_walk():
    (only,) = walk(1, -np.abs(OF_LOGIT), into, 0.7)
    assert len(only.nodes) == only.share == 0
