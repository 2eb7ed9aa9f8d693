"""Coactive features against a count over all pairs."""

import numpy as np
import pytest

from vitrine.training.cards import coactivity
from vitrine.training.cards.coactivity import MIN_TOGETHER, coactive


def test_it_is_the_jaccard_index_of_all_pairs(monkeypatch):
    monkeypatch.setattr(coactivity, "_BLOCK", 7)
    generator = np.random.default_rng(0)
    images, layers, features, k = 60, 2, 12, 5
    indices = np.stack([[generator.permutation(features)[:k] for _ in range(layers)] for _ in range(images)])
    values = np.where(generator.random((images, layers, k)) < 0.8, generator.normal(size=(images, layers, k)), 0)
    fires = np.zeros((images, layers, features), bool)
    for image, layer, place in zip(*np.nonzero(values), strict=True):
        fires[image, layer, indices[image, layer, place]] = True
    flat = fires.reshape(images, -1)
    coactives = coactive(indices, values, features, 4)
    assert len(coactives) == layers * features
    for feature, others in enumerate(coactives):
        pairs = []
        for other in range(layers * features):
            both, either = (flat[:, feature] & flat[:, other]).sum(), (flat[:, feature] | flat[:, other]).sum()
            if other != feature and both >= MIN_TOGETHER:
                pairs.append((-both / either, other))
        expected = sorted(pairs)[:4]
        assert [other.feature for other in others] == [other for _, other in expected]
        assert [other.jaccard for other in others] == pytest.approx([-share for share, _ in expected])


def test_features_that_never_fire_have_no_coactive_features():
    assert coactive(np.zeros((8, 1, 2), int), np.zeros((8, 1, 2)), 3, 4) == [[], [], []]
