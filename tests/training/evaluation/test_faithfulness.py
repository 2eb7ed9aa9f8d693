"""Keep and drop: masks and figures by hand; against the replacement model in test_evaluate.py."""

import pytest
import torch

from vitrine.models.bootstrap import Bootstrap
from vitrine.training.evaluation.faithfulness import Interventions, keep_masks, ranked


def test_the_largest_score_ranks_first():
    assert ranked(torch.tensor([0.1, 0.5, 0.5, -2.0, 0.2])).tolist() == [1, 2, 4, 0, 3]
    assert ranked(torch.tensor([[0.1, 0.2], [0.3, 0.2]])).tolist() == [[1, 0], [0, 1]]


def test_masks_by_hand():
    assert keep_masks(torch.tensor([2, 0, 1])).long().tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1]]
    stacked = keep_masks(torch.tensor([[0, 1], [1, 0]])).long()
    assert stacked.tolist() == [[[0, 0], [1, 0], [1, 1]], [[0, 0], [0, 1], [1, 1]]]


def classify(residual):
    """Two labels: the sign of the first dimension."""
    return torch.stack([residual[..., 0], -residual[..., 0]], dim=-1).log_softmax(-1)


@pytest.fixture
def collected():
    """Two images; layer 0 writes against the truth (label 0, positive), layer 2 decides, layer 1 does nothing.

    Residual before: 0; bias: -1. Layer by layer, image 0 gets (-2, 0, 4), image 1 (-2, 0, 2).
    """
    rankings = {"cls": torch.tensor([2, 1, 0]), "all": torch.tensor([0, 1, 2])}
    interventions = Interventions(classify, torch.tensor([-1.0, 0.0]), rankings, random_orders=5, seed=0)
    parts = torch.zeros(3, 2, 2)
    parts[:, 0, 0], parts[:, 1, 0] = torch.tensor([-2.0, 0, 4]), torch.tensor([-2.0, 0, 2])
    own = classify(torch.tensor([[1.0, 0], [1.0, 0]]))
    for image in range(2):
        single = slice(image, image + 1)
        interventions.update(torch.zeros(1, 2), parts[:, single], own[single], torch.tensor([0]))
    return interventions


def test_curves_by_hand(collected):
    figures = collected.figures(Bootstrap(2), torch.tensor([1.0, 1.0]))
    best, worst = figures.curve("cls"), figures.curve("all")
    assert best.order == [2, 1, 0]
    # kept: none -> -1; {2} -> (3, 1); {2, 1} -> (3, 1); all -> (1, -1)
    assert [point.value for point in best.keep] == [0, 1, 1, 0.5]
    # dropped: none -> (1, -1); {2} -> -3; {2, 1} -> -3; all -> -1
    assert [point.value for point in best.drop] == [0.5, 0, 0, 0]
    assert [point.value for point in worst.keep] == [0, 0, 0, 0.5]
    assert [point.value for point in worst.drop] == [0.5, 1, 1, 0]
    assert [point.value for point in figures.drop_one] == [1, 0.5, 0]
    assert figures.drop_one_mean.value == 0.5
    assert best.keep_top4.value == -0.5  # three layers: all of them
    assert best.drop_top1.value == -1


def test_divergences_are_those_of_the_curves(collected):
    figures = collected.figures(Bootstrap(2), torch.tensor([1.0, 1.0]))
    own = classify(torch.tensor([1.0, 0.0]))
    for at, values in ((0, (-1, -1)), (1, (3, 1)), (3, (1, -1))):
        log_probabilities = [classify(torch.tensor([float(value), 0.0])) for value in values]
        expected = sum((own.exp() * (own - other)).sum().item() for other in log_probabilities) / 2
        assert figures.curve("cls").keep_divergence[at] == pytest.approx(expected, abs=1e-6)


def test_each_images_own_ranking(collected):
    """Image 0: y = 2, scores (-1, 0, 2): layer 2 first. Image 1: y = 0, no scores: by number, so layer 0 first."""
    figures = collected.figures(Bootstrap(2), torch.tensor([1.0, 1.0])).curve("image")
    assert figures.order is None
    assert [point.value for point in figures.keep] == [0, 0.5, 0.5, 0.5]
    assert [point.value for point in figures.drop] == [0.5, 0.5, 0.5, 0]


def test_dropping_is_keeping_the_others(collected):
    keep, drop = collected.right("keep"), collected.right("drop")
    assert torch.equal(keep[..., 0], drop[..., -1])
    assert torch.equal(keep[..., -1], drop[..., 0])
    assert torch.equal(keep[:, 0].flip(-1), drop[:, 1])  # "all" is "cls" reversed


def test_random_orders_have_a_mean_and_a_spread(collected):
    figures = collected.figures(Bootstrap(2), torch.tensor([1.0, 1.0]))
    assert figures.random_orders == 5
    middle = collected.right("keep")[:, 2:, 1].mean(0)
    assert figures.random_keep[1].mean == pytest.approx(middle.mean().item())
    assert (figures.random_keep[1].lowest, figures.random_keep[1].highest) == (middle.min(), middle.max())
    assert figures.random_keep[0].deviation == 0


def test_harm_is_measured_from_all_layers(collected):
    figures = collected.figures(Bootstrap(2), torch.tensor([1.0, 1.0]))
    assert figures.harm_in_top1("cls") is None  # 0.5 with all layers, 0.5 on average without one
    whole, first = figures.curve("cls").drop_divergence[:2]
    one = sum(figures.drop_one_divergence) / 3
    assert figures.harm_in_divergence("cls") == pytest.approx((first - whole) / (one - whole))
