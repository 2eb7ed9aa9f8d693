"""Labels of features that fire where they are made to, and no labels where there is nothing to say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitrine.training.cards import labels as module
from vitrine.training.cards.labels import Labels, calibrate, clarity, describe, given, written, written_floor
from vitrine.training.cards.quality import aurocs, rank_images

HALF = 2**-0.5


def test_a_label_by_hand():
    """12 images each with and without the feature: word 1 swaps one pair of 144, word 0 half of them."""
    fires = np.arange(24)[:, None] >= 12
    sorted_wrong_once = np.arange(24.0)
    sorted_wrong_once[[11, 12]] = [12, 11]
    similarity = np.stack([np.tile([1.0, 2.0], 12), sorted_wrong_once, -np.arange(24.0)], 1)
    described = describe(fires, rank_images(similarity))
    assert described.word.tolist() == [1]
    assert described.score[0] == pytest.approx(143 / 144)
    assert described.margin[0] == pytest.approx(143 / 144 - 1 / 2)


def test_a_feature_that_fires_on_too_few_images_or_on_all_has_no_score():
    fires = np.arange(40)[:, None] < np.array([0, 9, 31, 40])
    described = describe(fires, rank_images(np.random.default_rng(0).normal(size=(40, 3))))
    assert np.isnan(described.score).all()
    assert np.isnan(described.margin).all()
    assert not given(described, 0.0).any()


def test_clarity_is_the_mean_cosine_of_two_exemplars():
    embeddings = F.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    exemplars = torch.arange(30).view(5, 6)
    for row, figure in zip(exemplars, clarity(embeddings, exemplars, torch.ones(5, 6)), strict=True):
        cosines = (embeddings[row] @ embeddings[row].T).double().numpy()
        assert figure == pytest.approx(cosines[np.triu_indices(6, 1)].mean(), abs=1e-6)


def test_clarity_is_that_of_the_places_in_use():
    embeddings = torch.tensor([[1.0, 0, 0], [HALF, HALF, 0], [0, 0, 1.0]])
    figures = clarity(embeddings, torch.tensor([[0, 1, 2], [0, 1, 2]]), torch.tensor([[3.0, 1.0, 0], [1.0, 0, 0]]))
    assert figures[0] == pytest.approx(HALF, abs=1e-6)
    assert np.isnan(figures[1]), "one exemplar says nothing"


def features(count=400, meaningful=200, images=1200, seed=0):
    """(fires, ranks): image i shows word i % 12 of 12; the first features fire on the images of one word, with errors,
    the others on a twelfth of all images."""
    generator = np.random.default_rng(seed)
    shows = np.arange(images) % 12
    similarity = (shows[:, None] == np.arange(12)) + 0.3 * generator.normal(size=(images, 12))
    wrong = generator.random((images, count)) < 0.02
    fires = (shows[:, None] == np.arange(count) % 12) ^ wrong
    fires[:, meaningful:] = generator.random((images, count - meaningful)) < 1 / 12
    return fires, rank_images(similarity)


def test_features_that_fire_on_random_images_get_no_label():
    fires, ranks = features(count=5000, meaningful=0)
    described = describe(fires, ranks)
    assert given(described, 0.0).sum() <= 15  # a thousandth of 5,000 is expected
    held_out = np.random.default_rng(0).normal(0.5, 0.05, 5000)
    assert calibrate(described, held_out) == np.inf
    assert not given(described, np.inf).any()


def test_features_with_a_meaning_get_theirs_beside_random_ones():
    described = describe(*features())
    meaningful = np.arange(400) < 200
    others, ranks = features(seed=1)
    threshold = calibrate(described, aurocs(others, ranks)[np.arange(400), described.word])
    labelled = given(described, threshold)
    assert described.word[meaningful].tolist() == [feature % 12 for feature in range(200)]
    assert labelled[meaningful].mean() > 0.95
    assert labelled[~meaningful].sum() <= 1


def labels(score, chance=0.0):
    score = np.array(score, float)
    return Labels(np.zeros(len(score), int), score, np.zeros_like(score), np.full_like(score, chance))


def test_the_threshold_is_the_lowest_that_holds_the_precision():
    score = np.linspace(0, 1, 100)
    held_out = np.where(np.arange(100) >= 37, 0.9, 0.6)
    threshold = calibrate(labels(score), held_out)
    assert (held_out[score >= threshold] >= 0.8).mean() >= module.PRECISION
    # one level (a fiftieth of the features) lower it would not have held
    assert (held_out[score >= threshold - 0.02] >= 0.8).mean() < module.PRECISION


def test_what_was_not_measured_calibrates_nothing():
    score = np.linspace(0, 1, 100)
    held_out = np.full(100, np.nan)
    assert calibrate(labels(score), held_out) == np.inf
    held_out[90:] = 0.99  # ten are too few to estimate a precision
    assert calibrate(labels(score), held_out) == np.inf
    assert calibrate(labels([]), np.array([])) == np.inf


def test_no_label_is_given_for_what_chance_reaches():
    score = np.linspace(0, 1, 100)
    threshold = calibrate(labels(score, chance=0.62), np.full(100, 0.99))
    assert (score[given(labels(score, chance=0.62), threshold)] >= 0.62).all()
    assert given(labels([0.7, 0.8, np.nan], chance=0.75), 0.5).tolist() == [False, True, False]


def test_what_a_direction_writes():
    words = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [-1.0, -1.0, 0]]), dim=-1)
    writes = written(torch.tensor([[2.0, 0.1, 7.0], [-3.0, -3.0, 0.0]]), words)
    assert writes.word.tolist() == [0, 2]
    assert writes.score[1] == pytest.approx(1, abs=1e-6)
    assert writes.margin[1] == pytest.approx(1 + HALF, abs=1e-6)


def test_random_directions_write_nothing():
    fold = torch.randn(32, 24, generator=torch.Generator().manual_seed(3))
    words = F.normalize(torch.randn(40, 24, generator=torch.Generator().manual_seed(4)), dim=-1)
    floor = written_floor(fold, words, seed=0)
    others = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(9)) @ fold
    assert (written(others, words).score >= floor).mean() < 0.003
