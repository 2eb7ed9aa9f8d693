"""Confidence intervals of measured figures: percentile bootstrap over images (Efron, 1979).

All figures share one set of resamples. Each resample is a vector of counts (how often each image was drawn), so the
means of M quantities under R resamples are one product, [R, n] @ [n, M]. Because the resamples are shared, the interval
of a difference is that of *paired* differences.

n images, R resamples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Array = NDArray[np.float64]


class Estimate(BaseModel):
    """A figure and its bootstrap interval."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    low: float
    high: float


class Bootstrap:
    """R resamples of n images, determined by a seed."""

    def __init__(self, images: int, *, seed: int = 0, resamples: int = 1000, confidence: float = 0.95) -> None:
        self.images, self.seed, self.resamples, self.confidence = images, seed, resamples, confidence
        generator = np.random.default_rng(seed)
        self._counts = np.empty((resamples, images), dtype=np.float32)
        for row in self._counts:
            row[:] = np.bincount(generator.integers(images, size=images), minlength=images)

    def drawn(self, first: int, count: int) -> NDArray[np.float32]:
        """How often every resample drew each of `count` images, from the `first` on: [R, count]."""
        return self._counts[:, first : first + count]

    def means(self, values: Array) -> Array:
        """Means of values [n, ...] over images under every resample: [R, ...]."""
        flat = np.asarray(values, dtype=np.float64).reshape(self.images, -1)
        parts = [counts.astype(np.float64) @ flat for counts in np.array_split(self._counts, 20)]
        return np.concatenate(parts).reshape(self.resamples, *np.shape(values)[1:]) / self.images

    def estimate(self, values: Array) -> Estimate:
        """The mean of values [n] and its interval."""
        return self.interval(float(np.mean(values)), self.means(values))

    def estimates(self, values: Array) -> list[Estimate]:
        """The mean of every column of values [n, M] and its interval."""
        samples = self.means(values)
        return [self.interval(float(mean), samples[:, m]) for m, mean in enumerate(np.mean(values, axis=0))]

    def interval(self, value: float, samples: Array) -> Estimate:
        """A figure with the interval that contains the middle `confidence` of its resamples [R]."""
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(samples, [tail, 1 - tail])
        return Estimate(value=value, low=float(low), high=float(high))
