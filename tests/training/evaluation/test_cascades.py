"""How predictions under replacement are counted."""

import pytest
import torch

from vitrine.models.bootstrap import Bootstrap
from vitrine.training.evaluation.cascades import Cascades, divergence


def test_divergence_by_hand():
    own, replaced = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert divergence(own, replaced).item() == pytest.approx(0.5 * torch.tensor([2.0, 2 / 3]).log().sum().item())
    assert divergence(own, own).item() == 0


def test_figures_by_hand():
    """Four images of two labels; the 'model' predicts what its window says."""
    certain = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()

    def replaced(own, window, tokens):
        return own if len(window) == 2 else 1 - own

    cascades = Cascades(replaced, lambda residual: certain[residual], [range(2), range(1, 2)], ("all",))
    for truth, own in (([0, 0], [0, 1]), ([1, 0], [1, 0])):
        cascades.update(torch.tensor(own), certain[own], torch.tensor(truth))
    baseline, (same, other) = cascades.figures(Bootstrap(4))
    assert baseline.value == 0.75
    assert (same.first, same.last, same.window, same.tokens) == (0, 1, "0–1", "all")
    assert (same.top1.value, same.difference.value, same.agreement.value) == (0.75, 0, 1)
    assert (same.difference.low, same.difference.high, same.divergence.value) == (0, 0, 0)
    assert (other.window, other.top1.value, other.difference.value, other.agreement.value) == ("1–1", 0.25, -0.5, 0)
    assert other.divergence.value == pytest.approx(0.8 * torch.tensor(9.0).log().item())
