"""Reconstruction figures against sums over all tokens at once in float64."""

import numpy as np
import pytest
import torch

from vitrine.models.account.windows import TOKENS
from vitrine.models.bootstrap import Bootstrap
from vitrine.models.dictionary.replacement import of_type
from vitrine.models.dictionary.sparse_products import SortedCode
from vitrine.training.evaluation.reconstruction import Reconstruction, median_by_layer, relative_error
from vitrine.training.evaluation.survey import Surveyor


def surveyed(clt, truth):
    surveyor = Surveyor(clt.layers, clt.width)
    surveyor.add(truth)
    return surveyor.survey()


def collected(clt, survey, truth, decoded, codes):
    """The figures of six images, in two batches of different sizes."""
    reconstruction, count = Reconstruction(clt, survey, Bootstrap(6)), truth.shape[2]
    for part in (slice(0, 4), slice(4, 6)):
        tokens = slice(count * part.start, count * part.stop)
        part_codes = [code._replace(indices=code.indices[tokens], values=code.values[tokens]) for code in codes]
        reconstruction.update(truth[:, part], decoded[:, part], part_codes)
    return reconstruction.figures()


@pytest.fixture(scope="module")
def pieces(clip, make_clt, make_pixels):
    """(CLT, MLP outputs [L, 6, T, d], CLT outputs, codes of the tokens) for six images."""
    clt = make_clt(clip, k=8, k_cls=3)
    taps = clip.tower(make_pixels(6))
    codes, decoded = clt(taps.mlp_in.flatten(1, 2), torch.arange(17).eq(0).repeat(6))
    return clt, taps.mlp_out, decoded.view_as(taps.mlp_out), codes


@pytest.fixture(scope="module")
def figures(pieces):
    clt, truth, decoded, codes = pieces
    return collected(clt, surveyed(clt, truth), truth, decoded, codes)


@pytest.mark.parametrize("tokens", TOKENS)
def test_every_figure_of_every_layer(pieces, figures, tokens):
    clt, truth, decoded, codes = pieces
    for layer in range(clt.layers):
        layer_figures = figures[tokens].layers[layer]
        y, output = (of_type(part[layer], tokens).flatten(0, 1).double() for part in (truth, decoded))
        r2 = 1 - (output - y).square().sum() / (y - y.mean(0)).square().sum()
        assert layer_figures.r2 == pytest.approx(r2.item(), rel=1e-9)
        assert layer_figures.mse == pytest.approx((output - y).square().mean().item(), rel=1e-9)
        assert layer_figures.cosine == pytest.approx(torch.cosine_similarity(output, y, dim=-1).mean().item(), rel=1e-9)
        dense = torch.zeros(6 * 17, clt.features).scatter_add(1, codes[layer].indices, codes[layer].values)
        active = of_type(dense.view(6, 17, -1), tokens).flatten(0, 1) != 0
        assert layer_figures.l0 == pytest.approx(active.sum(-1).double().mean().item())
        assert layer_figures.dead_share == pytest.approx(1 - active.any(0).double().mean().item())


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_clts_figures_are_means_over_layers(figures, tokens):
    figure = figures[tokens]
    for name in ("mse", "r2_kept", "relative_error", "outliers"):
        assert getattr(figure, name) == pytest.approx(sum(getattr(layer, name) for layer in figure.layers) / 3)
    assert figure.r2.value == pytest.approx(sum(layer.r2 for layer in figure.layers) / 3)
    assert figure.r2.low <= figure.r2.value <= figure.r2.high
    assert (figure.mean.r2, figure.mean.cosine) == (figure.r2.value, figure.cosine)
    assert figure.worst.r2 == min(layer.r2 for layer in figure.layers)
    assert figure.worst.relative_error == max(layer.relative_error for layer in figure.layers)


def test_cls_budgets_show_in_l0(figures):
    assert max(layer.l0 for layer in figures["cls"].layers) <= 3
    assert min(layer.l0 for layer in figures["patches"].layers) > 3


# Outliers: six images of five tokens. Layer 0: one massive patch, nearly right; layer 1: [CLS] is always massive.


@pytest.fixture(scope="module")
def massive(clip, make_clt):
    """(CLT, MLP outputs [3, 6, 5, 32], CLT outputs, empty codes)."""
    clt, generator = make_clt(clip), torch.Generator().manual_seed(1)
    truth = torch.randn(3, 6, 5, 32, generator=generator) + 0.5
    truth[0, 2, 3] *= 100
    truth[1, :, 0] *= 50
    decoded = truth + torch.randn(truth.shape, generator=generator) * torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])[:, None]
    codes = [SortedCode(torch.zeros(30, 1, dtype=torch.long), torch.zeros(30, 1), None, None)] * 3
    return clt, truth, decoded, codes


def naive(truth, decoded, tokens, layer):
    """(R^2, R^2 without outliers, share of outliers, median relative error), token by token in float64."""
    norms = [float(np.linalg.norm(y)) for y in truth[layer].double().reshape(30, 32).numpy()]
    chosen = [at for at in range(30) if tokens == "all" or (at % 5 == 0) == (tokens == "cls")]
    kept = [at for at in chosen if norms[at] <= 3 * np.median(norms)]
    y, output = (part[layer].double().reshape(30, 32).numpy() for part in (truth, decoded))

    def r2(which):
        if len(which) < 2:
            return None
        error = sum(((y[at] - output[at]) ** 2).sum() for at in which)
        return 1 - error / sum(((y[at] - y[which].mean(0)) ** 2).sum() for at in which)

    relative = np.median([np.linalg.norm(y[at] - output[at]) / norms[at] for at in chosen])
    return r2(chosen), r2(kept), 1 - len(kept) / len(chosen), relative


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("is_sample", [False, True])
def test_outliers_are_left_out(massive, tokens, is_sample):
    """Whatever centres the survey gave; only the median is taken from it."""
    clt, truth, decoded, codes = massive
    survey = surveyed(clt, truth)
    if is_sample:
        survey = survey._replace(means=survey.means + 3)
    figures = collected(clt, survey, truth, decoded, codes)[tokens]
    for layer, figure in enumerate(figures.layers):
        expected = naive(truth, decoded, tokens, layer)
        actual = (figure.r2, figure.r2_kept, figure.outliers, figure.relative_error)
        for one, other in zip(actual, expected, strict=True):
            assert one is other is None or one == pytest.approx(other, rel=1e-6, abs=1e-12)


def test_an_outlier_owns_the_variance(massive):
    """What this is for: nearly the same errors, one token."""
    clt, truth, decoded, codes = massive
    figures = collected(clt, surveyed(clt, truth), truth, decoded, codes)
    assert figures["all"].layers[0].r2 > 0.99
    assert figures["all"].layers[0].r2_kept < 0.8
    assert figures["all"].layers[0].outliers == pytest.approx(1 / 30)
    assert figures["cls"].layers[1].r2_kept is None
    assert figures["cls"].r2_kept == pytest.approx(
        (figures["cls"].layers[0].r2_kept + figures["cls"].layers[2].r2_kept) / 2
    )


def test_relative_errors_by_hand():
    assert relative_error(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([2.0, 0.0, 0.0])).tolist() == [0.5, 0, torch.inf]
    assert median_by_layer(torch.tensor([[[1.0, 9.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 1.0]]])).tolist() == [3, 0]
