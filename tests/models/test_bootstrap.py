"""The bootstrap, against a known distribution, against SciPy's, and by hand."""

import numpy as np
import pytest
from scipy import stats

from vitrine.models.bootstrap import Bootstrap


def test_the_interval_of_a_normal_mean_is_the_known_one():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=2000)
    estimate = Bootstrap(2000, seed=1).estimate(values)
    error = 1.96 * values.std() / np.sqrt(2000)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert estimate.high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_it_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(4).exponential(size=300)
    ours = Bootstrap(300, resamples=4000).estimate(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.01)


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    generator = np.random.default_rng(5)
    bootstrap = Bootstrap(100, resamples=500)
    estimates = [bootstrap.estimate(generator.random(100) < 0.7) for _ in range(400)]
    share = np.mean([estimate.low <= 0.7 <= estimate.high for estimate in estimates])
    assert 0.9 <= share <= 0.98


def test_differences_are_paired():
    """Two figures that differ by a constant for every image differ by it in every resample."""
    values = np.random.default_rng(6).random(50)
    estimate = Bootstrap(50).estimate((values + 0.25) - values)
    assert (estimate.low, estimate.high) == pytest.approx((0.25, 0.25))


def test_every_resample_draws_as_many_images_as_there_are():
    bootstrap = Bootstrap(7, resamples=64)
    assert bootstrap.means(np.ones((7, 2, 3))) == pytest.approx(np.ones((64, 2, 3)))
    shares = bootstrap.means(np.eye(7)) * 7
    assert shares == pytest.approx(shares.round())
    assert len(np.unique(shares, axis=0)) > 50


def test_columns_are_estimated_together():
    values = np.random.default_rng(7).random((40, 3))
    bootstrap = Bootstrap(40, seed=2)
    for column, estimate in enumerate(bootstrap.estimates(values)):
        alone = bootstrap.estimate(values[:, column])
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((alone.value, alone.low, alone.high))


def test_the_seed_decides():
    values = np.random.default_rng(8).random(40)
    assert Bootstrap(40, seed=1).estimate(values) == Bootstrap(40, seed=1).estimate(values)
    assert Bootstrap(40, seed=1).estimate(values) != Bootstrap(40, seed=2).estimate(values)
