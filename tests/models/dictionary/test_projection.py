"""The projection score: by hand, at any scale, and where there is none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitrine.models.dictionary.projection import CANCELLED, projection_scores


def test_scores_by_hand():
    parts = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]], [[1.0, 0.0]]])  # y = (4, 4), |y|^2 = 32
    assert projection_scores(parts, 0)[:, 0].tolist() == pytest.approx([12 / 32, 16 / 32, 4 / 32])


@given(st.floats(-36, 30), st.integers(1, 6), st.integers(1, 32), st.integers(0, 2**32))
def test_scores_do_not_depend_on_the_scale(exponent, sources, width, seed):
    """Activations may be as small as a rounding error: a pre-activation that ties with 0 is one on some CPUs."""
    parts = torch.randn(sources, 5, width, generator=torch.Generator().manual_seed(seed)).double()
    total = parts.sum(0)
    expected = (parts * total).sum(-1) / total.square().sum(-1)
    scores = projection_scores((parts * 10**exponent).float(), 0)
    sums = scores.sum(0)
    known = expected.abs().amax(0) < 0.9 / CANCELLED
    assert (((sums - 1).abs() < 1e-3) | (sums == 0)).all()
    assert (sums[known] != 0).all()
    clear = expected.abs().amax(0) < 10
    torch.testing.assert_close(scores[:, clear], expected[:, clear].float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("magnitude", [1.0, 1e-7, 1e-15, 1e-30])
def test_one_tiny_activation_has_the_whole_score(magnitude):
    """|y|^2 is far below the smallest float32 here; the score is 1 and not something in between."""
    parts = torch.zeros(3, 1, 4)
    parts[1, 0] = torch.tensor([1.0, -2.0, 0.0, 3.0]) * magnitude
    assert projection_scores(parts, 0)[:, 0].tolist() == [0, 1, 0]


def test_where_nothing_is_written_there_is_no_score():
    assert projection_scores(torch.zeros(3, 2, 4), 0).tolist() == [[0, 0]] * 3


def test_a_sum_that_is_lost_in_rounding_has_no_score():
    one = torch.tensor([[1.0, 2.0, 3.0]])
    rest = -one + torch.tensor([[0.0, 0.0, 1e-6]])
    assert projection_scores(torch.stack([one, rest]), 0).tolist() == [[0], [0]]
    assert projection_scores(torch.stack([one, -one]), 0).tolist() == [[0], [0]]
