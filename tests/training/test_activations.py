"""Which token is where, and a normalisation that can be folded away."""

import numpy as np
import pytest
import torch

from models.clt import CrossLayerTranscoder
from training.activations import Activations, Normalisation, activations, stream


@pytest.fixture(scope="module")
def batches(clip, make_pixels):
    """Four batches of different sizes."""
    pixels = make_pixels(14).split([3, 4, 5, 2])
    return list(stream(clip.tower, ((part, torch.zeros(len(part))) for part in pixels)))


@pytest.fixture(scope="module")
def normalisation(batches):
    return Normalisation.estimate(batches)


def test_tokens_lie_image_by_image_with_cls_first(clip, make_pixels):
    pixels = make_pixels(3)
    taps, found = clip.tower(pixels), activations(clip.tower(pixels))
    assert found.is_cls.nonzero().flatten().tolist() == [0, 17, 34]
    for image, token in ((0, 0), (1, 0), (1, 5), (2, 16)):
        place = image * 17 + token
        torch.testing.assert_close(found.mlp_in[:, place], taps.mlp_in[:, image, token], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.mlp_out[:, place], taps.mlp_out[:, image, token], rtol=1e-5, atol=1e-5)


def test_estimate_is_numpys_over_all_tokens(batches, normalisation):
    for name, mean, scale in (
        ("mlp_in", normalisation.in_mean, normalisation.in_scale),
        ("mlp_out", normalisation.out_mean, normalisation.out_scale),
    ):
        every = np.concatenate([getattr(batch, name).numpy() for batch in batches], axis=1).astype(np.float64)
        assert every.shape == (3, 14 * 17, 32)
        expected = every.mean(1)
        np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(scale, np.sqrt(((every - expected[:, None]) ** 2).mean((1, 2))), rtol=1e-5)
    cls = np.concatenate([batch.mlp_out[:, batch.is_cls].numpy() for batch in batches], axis=1)
    assert cls.shape == (3, 14, 32)
    np.testing.assert_allclose(normalisation.out_mean_cls, cls.mean(1), rtol=0, atol=1e-6)


def test_normalised_activations_have_mean_0_and_scale_1(batches, normalisation):
    every = [torch.cat(parts, 1) for parts in list(zip(*batches, strict=True))[:2]]
    for normalised in (normalisation.inputs(every[0]), normalisation.targets(every[1])):
        torch.testing.assert_close(normalised.mean(1), torch.zeros(3, 32), rtol=0, atol=1e-5)
        torch.testing.assert_close(normalised.square().mean((1, 2)), torch.ones(3))


def test_estimate_by_hand():
    x = torch.tensor([[[1.0, 10.0], [3.0, 10.0]]])  # one layer, two tokens, width 2
    found = Normalisation.estimate([Activations(x, 2 * x, torch.tensor([True, False]))])
    assert found.in_mean.tolist() == [[2, 10]]
    assert found.in_scale.tolist() == pytest.approx([0.5**0.5])  # deviations -1, 1, 0, 0
    assert found.out_mean.tolist() == [[4, 20]]
    assert found.out_scale.tolist() == pytest.approx([2 * 0.5**0.5])
    assert found.out_mean_cls.tolist() == [[2, 20]]


def test_estimate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no activations"):
        Normalisation.estimate([])


def test_folded_clt_does_on_raw_activations_what_the_other_does_on_normalised_ones(batches, normalisation, clt):
    folded = normalisation.fold_into(clt)
    for batch in batches:
        expected, found = clt.encode(normalisation.inputs(batch.mlp_in)), folded.encode(batch.mlp_in)
        shape = (*expected.indices.shape[:2], clt.features)
        dense = [torch.zeros(shape).scatter_add(-1, code.indices, code.values) for code in (expected, found)]
        torch.testing.assert_close(*dense, rtol=0, atol=1e-4)
        torch.testing.assert_close(normalisation.targets(folded(batch.mlp_in)), clt.decode(expected), rtol=0, atol=1e-4)


def test_folding_leaves_the_trained_clt_alone(normalisation, make_clt, clip):
    clt = make_clt(clip, seed=5)
    before = {name: tensor.clone() for name, tensor in clt.state_dict().items()}
    folded = normalisation.fold_into(clt)
    assert isinstance(folded, CrossLayerTranscoder)
    for name, tensor in clt.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert not torch.equal(tensor, folded.state_dict()[name])
