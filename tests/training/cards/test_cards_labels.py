"""Labels of features whose exemplars are placed by hand, and no labels where there is nothing to say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitrine.training.cards import labels as module
from vitrine.training.cards.labels import Labels, Thresholds, calibrate, describe, random_floor, written, written_floor

WORDS = torch.eye(3)  # three words at right angles
HALF = 2**-0.5


def test_a_label_by_hand():
    embeddings = torch.tensor([[1.0, 0, 0], [HALF, HALF, 0], [0, 0, 1.0]])
    described = describe(embeddings, torch.tensor([[0, 1, 2]]), torch.tensor([[3.0, 1.0, 0.0]]), WORDS)
    mean = np.array([3 + HALF, HALF, 0]) / 4
    assert described.word.tolist() == [0]
    assert described.score[0] == pytest.approx(mean[0], abs=1e-6)
    assert described.margin[0] == pytest.approx(mean[0] - mean[1], abs=1e-6)
    assert described.clarity[0] == pytest.approx(HALF, abs=1e-6)  # of the two that are used


def test_clarity_is_the_mean_cosine_of_two_exemplars():
    embeddings = F.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    exemplars = torch.arange(30).view(5, 6)
    described = describe(embeddings, exemplars, torch.ones(5, 6), torch.eye(8))
    for row, clarity in zip(exemplars, described.clarity, strict=True):
        cosines = (embeddings[row] @ embeddings[row].T).double().numpy()
        assert clarity == pytest.approx(cosines[np.triu_indices(6, 1)].mean(), abs=1e-6)


def test_one_exemplar_says_nothing():
    described = describe(torch.eye(3), torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]), WORDS)
    assert np.isnan([described.score[0], described.margin[0], described.clarity[0]]).all()
    assert not Thresholds(-1, -1, -1).passed(described).any()


def features(count=400, images=2000, clear=0.5, seed=0):
    """(embeddings, exemplars, weights): the first `clear` part of the features have exemplars of one word each."""
    generator = torch.Generator().manual_seed(seed)
    words = F.normalize(torch.randn(12, 16, generator=generator), dim=-1)
    words = F.normalize(words - words.mean(0), dim=-1)
    shows = torch.arange(images) % 12
    noise = torch.randn(images, 16, generator=generator)
    embeddings = F.normalize(words[shows] + 0.15 * noise, dim=-1)
    embeddings = F.normalize(embeddings - embeddings.mean(0), dim=-1)
    of_word = torch.stack([torch.nonzero(shows == word)[:, 0][: images // 12] for word in range(12)])
    pick = torch.randint(images // 12, (count, 16), generator=generator)
    clean = of_word[torch.arange(count) % 12].gather(1, pick)
    exemplars = torch.where(
        torch.arange(count)[:, None] < clear * count, clean, torch.randint(images, (count, 16), generator=generator)
    )
    return words, embeddings, exemplars, torch.rand(count, 16, generator=generator) + 0.5


def test_features_that_fire_on_random_images_get_no_label():
    words, embeddings, exemplars, weights = features(count=5000, clear=0.0)
    described = describe(embeddings, exemplars, weights, words)
    floor = random_floor(embeddings, weights, words, seed=1)
    assert floor.passed(described).sum() <= 5  # a thousandth of 5,000 by each of two criteria; by both: hardly any
    # as expected of them: their labels say nothing about held-out images
    aurocs = np.random.default_rng(0).normal(0.5, 0.05, 5000)
    thresholds = calibrate(described, aurocs, floor)
    assert thresholds == Thresholds(np.inf, np.inf, np.inf)
    assert thresholds.passed(described).sum() == 0


def test_features_with_a_meaning_get_theirs_beside_random_ones():
    words, embeddings, exemplars, weights = features()
    described = describe(embeddings, exemplars, weights, words)
    meaningful = np.arange(400) < 200
    aurocs = np.where(meaningful, 0.95, 0.5)
    thresholds = calibrate(described, aurocs, random_floor(embeddings, weights, words, seed=1))
    passed = thresholds.passed(described)
    assert described.word[meaningful].tolist() == [feature % 12 for feature in range(200)]
    assert passed[meaningful].mean() > 0.95
    assert not passed[~meaningful].any()


def labels(score, margin=None, clarity=None):
    count = len(score)
    parts = (np.array(part, float) if part is not None else np.ones(count) for part in (score, margin, clarity))
    return Labels(np.zeros(count, int), *parts)


def test_thresholds_are_the_lowest_that_hold_the_precision():
    score = np.linspace(0, 1, 100)
    aurocs = np.where(np.arange(100) >= 37, 0.9, 0.6)
    thresholds = calibrate(labels(score), aurocs, Thresholds(0.0, 0.0, 0.0))
    passed = thresholds.passed(labels(score))
    assert (aurocs[passed] >= 0.8).mean() >= module.PRECISION
    # one level (a tenth of the features) lower it would not have held
    lower = labels(score).score >= thresholds.score - 0.1
    assert (aurocs[lower] >= 0.8).mean() < module.PRECISION


def test_what_was_not_measured_calibrates_nothing():
    score = np.linspace(0, 1, 100)
    aurocs = np.full(100, np.nan)
    assert not np.isfinite(calibrate(labels(score), aurocs, Thresholds(0.0, 0.0, 0.0)).score)
    aurocs[90:] = 0.99  # ten are too few to estimate a precision
    assert not np.isfinite(calibrate(labels(score), aurocs, Thresholds(0.0, 0.0, 0.0)).score)
    assert not np.isfinite(calibrate(labels([]), np.array([]), Thresholds(0.0, 0.0, 0.0)).score)


def test_no_threshold_falls_below_what_random_sets_reach():
    score = np.linspace(0, 1, 100)
    thresholds = calibrate(labels(score), np.full(100, 0.99), Thresholds(0.62, 0.0, 0.0))
    assert thresholds.score >= 0.62


def test_each_of_the_three_can_forbid_a_label():
    thresholds = Thresholds(score=0.5, clarity=0.4, margin=0.3)
    described = labels([0.6, 0.4, 0.6, 0.6], margin=[0.4, 0.4, 0.2, 0.4], clarity=[0.5, 0.5, 0.5, 0.3])
    assert thresholds.passed(described).tolist() == [True, False, False, False]


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
