"""The activations' scale, which outlier tokens do not set, and a CLT from which it can be folded away."""

import numpy as np
import pytest
import torch

from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.training.data.activations import Activations
from vitrine.training.data.normalisation import OUTLIER, Normalisation
from vitrine.training.data.stream import stream


@pytest.fixture(scope="module")
def batches(clip, make_pixels):
    """Four batches of different sizes; in the second layer of each the third token is massive."""
    pixels = make_pixels(14).split([3, 4, 5, 2])
    batches = list(stream(Activations, clip.tower, ((part, torch.zeros(len(part))) for part in pixels)))
    for batch in batches:
        batch.mlp_out[1, 2] *= 100
    return batches


@pytest.fixture(scope="module")
def normalisation(batches):
    return Normalisation.estimate(batches)


def test_estimate_is_numpys_without_outliers(batches, normalisation):
    x, y = (
        np.concatenate([getattr(batch, name).numpy() for batch in batches], axis=1).astype(np.float64)
        for name in ("mlp_in", "mlp_out")
    )
    is_cls = np.concatenate([batch.is_cls.numpy() for batch in batches])
    assert x.shape == (3, 14 * 17, 32)
    medians = np.median(np.linalg.norm(batches[0].mlp_out.numpy(), axis=-1), axis=1)
    np.testing.assert_allclose(normalisation.outlier_norm, OUTLIER * medians, rtol=1e-2)  # of 51 tokens, none halfway
    for layer in range(3):
        kept = np.linalg.norm(y[layer], axis=-1) <= OUTLIER * medians[layer]
        assert (layer == 1) == (not kept.all())
        for tokens, mean, scale in (
            (x[layer], normalisation.in_mean, normalisation.in_scale),
            (y[layer][kept], normalisation.out_mean, normalisation.out_scale),
            (y[layer][is_cls], normalisation.out_mean_cls, normalisation.out_scale_cls),
        ):
            np.testing.assert_allclose(mean[layer], tokens.mean(0), rtol=0, atol=1e-6)
            np.testing.assert_allclose(scale[layer], np.sqrt(((tokens - tokens.mean(0)) ** 2).mean()), rtol=1e-5)


def test_massive_tokens_do_not_move_the_scale(clip, make_pixels, batches, normalisation):
    plain = Normalisation.estimate(stream(Activations, clip.tower, [(make_pixels(14), torch.zeros(14))]))
    torch.testing.assert_close(normalisation.out_scale, plain.out_scale, rtol=0.05, atol=0)
    massive = torch.cat([batch.mlp_out[1] for batch in batches])
    assert (massive - massive.mean(0)).square().mean().sqrt() > 2 * normalisation.out_scale[1]


def test_normalised_activations_have_mean_0_and_scale_1(batches, normalisation):
    x, y = (torch.cat(parts, 1) for parts in list(zip(*batches, strict=True))[:2])
    kept = y.norm(dim=-1) <= normalisation.outlier_norm[:, None]
    for normalised, mask in ((normalisation.inputs(x), torch.ones_like(kept)), (normalisation.targets(y), kept)):
        for tokens, chosen in zip(normalised, mask, strict=True):
            torch.testing.assert_close(tokens[chosen].mean(0), torch.zeros(32), rtol=0, atol=1e-5)
            assert tokens[chosen].square().mean().item() == pytest.approx(1, rel=1e-5)


def test_estimate_by_hand():
    x = torch.tensor([[[1.0, 10.0], [3.0, 10.0], [2.0, 10.0]]])  # one layer, three tokens, width 2
    y = 2 * x * torch.tensor([1.0, 1.0, 50.0])[None, :, None]
    estimate = Normalisation.estimate([Activations(x, y, torch.tensor([True, False, False]))])
    assert estimate.in_mean.tolist() == [[2, 10]]
    assert estimate.in_scale.tolist() == pytest.approx([(2 / 6) ** 0.5])  # deviations -1, 1, 0 and 0, 0, 0
    assert estimate.outlier_norm.tolist() == pytest.approx([3 * 436**0.5])  # lengths of (2, 20), (6, 20), (200, 1000)
    assert estimate.out_mean.tolist() == [[4, 20]]
    assert estimate.out_scale.tolist() == pytest.approx([2 * 0.5**0.5])
    assert estimate.out_mean_cls.tolist() == [[2, 20]]
    assert estimate.out_scale_cls.tolist() == pytest.approx([0.01 * 2 * 0.5**0.5])  # one [CLS] alone does not vary


def test_estimate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no activations"):
        Normalisation.estimate([])


@pytest.mark.parametrize("cross_layer", [True, False])
@pytest.mark.parametrize("sparsifier", ["relu_topk", "abs_topk", "jumprelu", "batch_topk"])
def test_folded_clt_does_on_raw_activations_what_the_other_does_on_normalised_ones(
    batches, normalisation, make_clt, clip, sparsifier, cross_layer
):
    clt = make_clt(clip, k_cls=5, sparsifier=sparsifier, cross_layer=cross_layer)
    for layer, encoder in enumerate(clt.encoders):  # thresholds as training leaves them, different everywhere
        for name, tensor in encoder.sparsifier.state_dict().items():
            start = -2.0 if name == "log_threshold" else 0.1 * (layer + 1)
            tensor.copy_(torch.linspace(start, start + 0.5, tensor.numel()))
    folded = normalisation.fold_into(clt)
    assert not folded.training
    for batch in batches:
        expected, output = clt(normalisation.inputs(batch.mlp_in), batch.is_cls)
        folded_codes, raw_output = folded(batch.mlp_in, batch.is_cls)
        for one, two in zip(expected, folded_codes, strict=True):
            assert one.values.count_nonzero() > 0
            torch.testing.assert_close(_dense(one), _dense(two), rtol=0, atol=1e-4)
        torch.testing.assert_close(normalisation.targets(raw_output), output, rtol=0, atol=1e-4)


def _dense(code):
    return torch.zeros(len(code.indices), 64).scatter_add(1, code.indices, code.values)


def test_folding_leaves_the_trained_clt_alone(normalisation, make_clt, clip):
    clt = make_clt(clip, seed=5)
    before = {name: tensor.clone() for name, tensor in clt.state_dict().items()}
    folded = normalisation.fold_into(clt.bfloat16())
    assert isinstance(folded, CrossLayerTranscoder)
    for name, tensor in clt.state_dict().items():
        assert torch.equal(tensor, before[name].bfloat16())
        assert folded.state_dict()[name].dtype == torch.float32
        assert not torch.equal(tensor.float(), folded.state_dict()[name])
    assert normalisation.fold_into(clt.train()).training
