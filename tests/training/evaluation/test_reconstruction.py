"""Reconstruction figures against sums over all tokens at once in float64, and torchmetrics'."""

import pytest
import torch
from torchmetrics import R2Score

from vitrine.models.account.windows import TOKENS
from vitrine.training.evaluation.bootstrap import Bootstrap
from vitrine.training.evaluation.reconstruction import Reconstruction, chosen_tokens


@pytest.fixture(scope="module")
def pieces(clip, make_clt, make_pixels):
    """(CLT, MLP outputs [L, 6, T, d], CLT outputs, codes of the tokens) for six images."""
    clt = make_clt(clip, k=8, k_cls=3)
    taps = clip.tower(make_pixels(6))
    codes, decoded = clt(taps.mlp_in.flatten(1, 2), torch.arange(17).eq(0).repeat(6))
    return clt, taps.mlp_out, decoded.view_as(taps.mlp_out), codes


@pytest.fixture(scope="module")
def figures(pieces):
    """In two batches of different sizes."""
    clt, truth, decoded, codes = pieces
    means = torch.stack([chosen_tokens(truth, tokens).double().mean((1, 2)) for tokens in TOKENS])
    collected = Reconstruction(clt, means)
    for part in (slice(0, 4), slice(4, 6)):
        tokens = slice(17 * part.start, 17 * part.stop)
        part_codes = [code._replace(indices=code.indices[tokens], values=code.values[tokens]) for code in codes]
        collected.update(truth[:, part], decoded[:, part], part_codes)
    return collected.figures(Bootstrap(6))


@pytest.mark.parametrize("tokens", TOKENS)
def test_every_figure_of_every_layer(pieces, figures, tokens):
    clt, truth, decoded, codes = pieces
    for layer in range(clt.layers):
        layer_figures = figures[tokens].layers[layer]
        y, output = (chosen_tokens(part, tokens)[layer].flatten(0, 1).double() for part in (truth, decoded))
        r2 = R2Score(multioutput="variance_weighted").set_dtype(torch.float64)
        assert layer_figures.r2 == pytest.approx(r2(output, y).item(), rel=1e-9)
        assert layer_figures.mse == pytest.approx((output - y).square().mean().item(), rel=1e-9)
        assert layer_figures.cosine == pytest.approx(torch.cosine_similarity(output, y, dim=-1).mean().item(), rel=1e-9)
        dense = torch.zeros(6 * 17, clt.features).scatter_add(1, codes[layer].indices, codes[layer].values)
        active = chosen_tokens(dense.view(1, 6, 17, -1), tokens)[0].flatten(0, 1) != 0
        assert layer_figures.l0 == pytest.approx(active.sum(-1).double().mean().item())
        assert layer_figures.dead_share == pytest.approx(1 - active.any(0).double().mean().item())


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_clts_figures_are_means_over_layers(figures, tokens):
    figure = figures[tokens]
    assert figure.r2.value == pytest.approx(sum(layer.r2 for layer in figure.layers) / 3)
    assert figure.mse == pytest.approx(sum(layer.mse for layer in figure.layers) / 3)
    assert figure.r2.low <= figure.r2.value <= figure.r2.high


def test_cls_budgets_show_in_l0(figures):
    assert max(layer.l0 for layer in figures["cls"].layers) <= 3
    assert min(layer.l0 for layer in figures["patches"].layers) > 3


def test_an_exact_clt_has_r2_1(pieces):
    clt, truth, _, codes = pieces
    means = torch.stack([chosen_tokens(truth, tokens).double().mean((1, 2)) for tokens in TOKENS])
    collected = Reconstruction(clt, means)
    collected.update(truth, truth, codes)
    figure = collected.figures(Bootstrap(6))["all"]
    assert (figure.r2.value, figure.r2.low, figure.mse) == (1, 1, 0)
    assert figure.cosine == pytest.approx(1)
