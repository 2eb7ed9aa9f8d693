"""AUROC against scipy, and by hand."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from vitrine.training.cards.quality import MIN_IMAGES, aurocs, chance, good_share, rank_images


def test_it_is_the_share_of_pairs_in_order():
    generator = np.random.default_rng(0)
    similarity = generator.normal(size=(80, 4)).round(1)  # with ties
    fires = generator.random((80, 30)) < generator.uniform(0.2, 0.8, 30)
    found = aurocs(fires, rank_images(similarity))
    for feature, word in np.ndindex(found.shape):
        fire, silent = similarity[fires[:, feature], word], similarity[~fires[:, feature], word]
        share = mannwhitneyu(fire, silent).statistic / (len(fire) * len(silent))
        assert found[feature, word] == pytest.approx(share, abs=1e-6)


def test_a_label_that_predicts_and_one_that_predicts_the_opposite():
    similarity = np.linspace(0, 1, 40)[:, None]
    fires = np.stack([np.arange(40) >= 20, np.arange(40) < 20], 1)
    assert aurocs(fires, rank_images(similarity)).tolist() == [[1.0], [0.0]]


def test_too_few_images_of_either_kind_are_not_measured():
    similarity = np.linspace(0, 1, 40)[:, None]
    counts = [0, MIN_IMAGES - 1, MIN_IMAGES, 40 - MIN_IMAGES, 41 - MIN_IMAGES, 40]
    fires = np.stack([np.arange(40) < count for count in counts], 1)
    found = aurocs(fires, rank_images(similarity))[:, 0]
    assert np.isnan(found).tolist() == [True, True, False, False, True, True]


def test_random_images_hardly_ever_reach_more_than_chance():
    """Of 4,000 features that fire on random images, many or few, with 50 words."""
    generator = np.random.default_rng(0)
    ranks = rank_images(generator.normal(size=(400, 50)))
    fires = generator.random((400, 4000)) < generator.uniform(0.05, 0.9, 4000)
    best = aurocs(fires, ranks).max(1)
    bound = chance(fires, 50)
    assert (best > bound).mean() < 2e-3  # one in a thousand
    assert (best > bound - 0.02).mean() > 2e-3, "the bound is not far above what they reach"
    assert chance(fires[:, :1], 5000) > bound[0], "the best of more words is better by chance"


def test_shares():
    assert good_share(np.array([0.79, 0.8, 0.9, 1.0])) == 0.75
    assert good_share(np.array([])) is None
