"""Retrieval on six images whose neighbours can be found by hand."""

import numpy as np
import pytest
import torch
from scipy import sparse

from vitrine.models.dictionary.sparsify import Code
from vitrine.training.evaluation import retrieval
from vitrine.training.evaluation.retrieval import Gallery, nearest

ROWS = np.array(
    [
        [1.0, 0, 0, 0],  # 0
        [2.0, 0, 0, 0],  # 1: as 0
        [1.0, 1, 0, 0],  # 2: 45 degrees from 0
        [0, 3.0, 0, 0],  # 3
        [0, 0, -1.0, 0],  # 4: opposite of 5
        [0, 0, 1.0, 0],  # 5
    ]
)


def test_the_nearest_by_cosine():
    neighbours = nearest(sparse.csr_array(ROWS), np.array([0, 3, 5]), 3)
    assert neighbours[0].tolist() == [1, 2, 3]
    assert neighbours[1].tolist() == [2, 0, 1]
    assert neighbours[2].tolist() == [0, 1, 2]  # orthogonal ones in index order, before the opposite
    assert nearest(sparse.csr_array(ROWS), np.array([5]), 5)[0, -1] == 4


def test_it_is_the_dense_cosine(monkeypatch):
    monkeypatch.setattr(retrieval, "_CHUNK", 7)
    generator = np.random.default_rng(0)
    rows = np.where(generator.random((40, 30)) < 0.2, generator.normal(size=(40, 30)), 0)
    rows[3] = 0  # an image without any active feature
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity.round(12), axis=1, kind="stable")[:, :4]
    neighbours = nearest(sparse.csr_array(rows), np.arange(40), 4)
    assert np.take_along_axis(similarity, neighbours, 1) == pytest.approx(np.take_along_axis(similarity, order, 1))


def gallery(truth):
    """One layer that knows the classes, one that knows nothing, in two batches."""
    truth = torch.tensor(truth)
    collected = Gallery(layers=2, features=8)
    for part in truth.split(4):
        knows = Code(torch.stack([part, part], 1), torch.tensor([[1.0, 0.0]]).repeat(len(part), 1))
        nothing = Code(torch.full((len(part), 1), 7), torch.ones(len(part), 1))
        collected.update([knows, nothing], torch.eye(8)[part], part)
    return collected


def test_scores_by_hand(monkeypatch):
    monkeypatch.setattr(retrieval, "NEAREST", 2)
    figures = gallery([0, 0, 0, 1, 1, 1]).figures(("a", "b"), seed=0)
    assert figures.layers[0].value == 1
    # all alike: the first two other images, so (0, 1, 2) see 2 of their class, (3, 4, 5) none
    assert figures.layers[1].value == 0.5
    assert figures.embedding.value == 1
    assert figures.chance == pytest.approx(2 / 5)
    assert figures.queries == 6
    assert {example.label for example in figures.examples} == {"a", "b"}
    for example in figures.examples:
        assert all(example.query not in layer for layer in example.layers)
        assert example.labels[0] == [example.label] * 2


def test_too_few_images_have_no_neighbours():
    assert gallery([0, 1, 0, 1, 0]).figures(("a", "b"), seed=0) is None
