"""Independent scoring against float64, and what it has in common with a softmax and what not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrine.models.account import ledger
from vitrine.models.account.scoring import SOFTMAX, Independent

COSINES = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8)


@given(COSINES, st.floats(-1, 1), st.floats(1, 200))
def test_a_label_reaches_its_threshold_exactly_where_its_cosine_does(cosines, threshold, scale):
    logits = scale * np.array(cosines, np.float32)
    scoring = Independent(np.full(len(cosines), threshold), scale)
    reached = np.asarray(logits, np.float64) / scale >= threshold
    np.testing.assert_array_equal(scoring.margins(logits) >= 0, reached)
    probabilities = scoring.probabilities(logits)
    assert (probabilities[reached] >= 0.5).all()
    assert (probabilities[~reached] <= 0.5).all()  # .5 itself where a float knows no difference


@given(COSINES, st.floats(-1, 1))
def test_probabilities_are_the_logistic_function(cosines, threshold):
    logits = 100 * np.array(cosines)
    scores = Independent(np.full(len(cosines), threshold), 100.0).probabilities(logits)
    with np.errstate(over="ignore"):
        expected = 1 / (1 + np.exp(-100 * (np.array(cosines) - threshold)))
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=0)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_other_labels_do_not_matter():
    scoring = Independent(np.array([0.2, 0.3]), 100.0)
    alone = Independent(np.array([0.2]), 100.0)
    logits = np.array([[21.0, 25.0], [19.0, 99.0]])
    np.testing.assert_array_equal(scoring.probabilities(logits)[:, :1], alone.probabilities(logits[:, :1]))
    assert scoring.probabilities(logits)[0] == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.exp(5))])
    assert scoring.margins(logits)[0] == pytest.approx([1, -5])


def test_the_softmax_is_clips_own():
    logits = np.array([1.0, 3.0, 2.0])
    np.testing.assert_array_equal(SOFTMAX.probabilities(logits), ledger.probabilities(logits))
    assert SOFTMAX.margins(logits) is logits
