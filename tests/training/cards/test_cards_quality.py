"""AUROC against torchmetrics, and by hand."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from vitrine.training.cards.quality import MIN_IMAGES, auroc, good_share, rank_images


def test_it_is_torchmetrics_auroc():
    generator = np.random.default_rng(0)
    similarity = generator.normal(size=(80, 4)).round(1)  # with ties
    fires = generator.random((80, 30)) < generator.uniform(0.2, 0.8, 30)
    words = generator.integers(0, 4, 30)
    aurocs = auroc(fires, rank_images(similarity), words)
    for feature, word in enumerate(words):
        expected = binary_auroc(
            torch.from_numpy(similarity[:, word]).sigmoid(), torch.from_numpy(fires[:, feature]).int()
        )
        assert aurocs[feature] == pytest.approx(float(expected), abs=1e-6)


def test_a_label_that_predicts_and_one_that_predicts_the_opposite():
    similarity = np.linspace(0, 1, 40)[:, None]
    fires = np.stack([np.arange(40) >= 20, np.arange(40) < 20], 1)
    assert auroc(fires, rank_images(similarity), np.zeros(2, int)).tolist() == [1.0, 0.0]


def test_too_few_images_of_either_kind_are_not_measured():
    similarity = np.linspace(0, 1, 40)[:, None]
    counts = [0, MIN_IMAGES - 1, MIN_IMAGES, 40 - MIN_IMAGES, 41 - MIN_IMAGES, 40]
    fires = np.stack([np.arange(40) < count for count in counts], 1)
    aurocs = auroc(fires, rank_images(similarity), np.zeros(len(counts), int))
    assert np.isnan(aurocs).tolist() == [True, True, False, False, True, True]


def test_shares():
    assert good_share(np.array([0.79, 0.8, 0.9, 1.0])) == 0.75
    assert good_share(np.array([])) is None
