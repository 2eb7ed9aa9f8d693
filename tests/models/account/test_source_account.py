"""The source account's parts: sums, features over all tokens, their maps; by hand."""

import numpy as np
import pytest

from vitrine.models.account.sources import Sources


@pytest.fixture
def sources():
    """Two layers, three tokens, two places: feature 5 of layer 1 fires at tokens 0 and 2; unused places name 0."""
    return Sources(
        logit=10.0,
        embeddings=np.array([1.0, 0.5, -0.5]),
        features=np.array([[[2.0, 1.0], [0.0, 0.0], [3.0, 0.0]], [[-4.0, 0.5], [0.25, 0.0], [-1.0, 0.0]]]),
        biases=np.array([0.5, -0.25]),
        errors=np.array([[0.1, 0.2, 0.3], [0.0, 0.0, 0.4]]),
        constants=6.0,
        indices=np.array([[[3, 7], [0, 0], [3, 0]], [[5, 6], [7, 0], [5, 0]]]),
    )


def test_all_parts_and_the_remainder_sum_to_the_logit(sources):
    assert sources.remainder == pytest.approx(10 - 6 - (1 + 1.75 + 0.25 + 1))


def test_map_has_what_was_written_at_each_token(sources):
    np.testing.assert_allclose(sources.map, [1 + 3 - 3.5 + 0.1, 0.5 + 0.25 + 0.2, -0.5 + 3 - 1 + 0.7])


def test_a_feature_is_summed_over_tokens_and_unused_places_are_none(sources):
    layers, indices, totals = sources.by_feature()
    assert list(zip(layers, indices, totals, strict=True)) == [
        (0, 3, 5.0), (1, 5, -5.0), (0, 7, 1.0), (1, 6, 0.5), (1, 7, 0.25)
    ]  # fmt: skip


def test_a_feature_keeps_its_tokens(sources):
    np.testing.assert_array_equal(sources.tokens_of(1, 5), [-4, 0, -1])
    np.testing.assert_array_equal(sources.tokens_of(0, 5), [0, 0, 0])
