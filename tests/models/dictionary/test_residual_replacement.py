"""The tower with SAEs in its stream: block by block by hand, and what errors do to values and gradients."""

import pytest
import torch

from vitrine.models.account.windows import TOKENS
from vitrine.models.dictionary.residual_replacement import ResidualReplacement, mixed
from vitrine.models.dictionary.residual_sae import ResidualSaes, SaeArchitecture


@pytest.fixture(scope="module")
def model(clip):
    """SAEs of 24 and 40 features after the first two of the tiny CLIP's three blocks."""
    generator = torch.Generator().manual_seed(3)
    saes = ResidualSaes(SaeArchitecture(32, (24, 40), (5, 6), (3, 8)))
    saes.initialise(generator)
    with torch.no_grad():
        for decoder in saes.decoders:
            decoder.bias.normal_(std=0.1, generator=generator)
    return ResidualReplacement(clip.tower, saes.eval())


def test_an_empty_window_is_the_tower(model, clip, make_pixels):
    pixels = make_pixels(2)
    out = model(pixels, range(0))
    assert torch.equal(out.residual, clip.tower(pixels).residual_out)
    assert out.codes == [None, None]


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_window_by_hand(model, clip, make_pixels, tokens):
    """Token by token: each chosen one is standardised, coded and given back, the next block reads all of them."""
    tower, saes, pixels = clip.tower, model.saes, make_pixels(2)
    with torch.no_grad():
        stream = tower.embed(pixels)
        for layer in range(3):
            stream = stream + tower.attention(layer, stream)
            stream = stream + tower.mlp(layer, stream)[1]
            for image in range(2 if layer < 2 else 0):
                for token in range(17):
                    if tokens == "all" or (token == 0) == (tokens == "cls"):
                        x = stream[image, token].clone()
                        scale = x.std() + 1e-5
                        a = saes.encoders[layer].weight @ ((x - x.mean()) / scale) + saes.encoders[layer].bias
                        k = (saes.architecture.k_cls if token == 0 else saes.architecture.k)[layer]
                        values, chosen = a.topk(k)
                        decoder = saes.decoders[layer]
                        version = values.relu() @ decoder.weight[chosen] + decoder.bias
                        stream[image, token] = version * scale + x.mean()
        found = model(pixels, range(2), tokens)
    torch.testing.assert_close(found.residual, stream, rtol=1e-4, atol=1e-4)
    count = {"all": 17, "cls": 1, "patches": 16}[tokens]
    assert [len(code.values) for code in found.codes] == [2 * count] * 2


def test_with_errors_kept_values_are_the_towers_and_gradients_go_through_features(model, clip, make_pixels):
    pixels = make_pixels(1)
    kept = model(pixels, range(2), keep_error=True)
    torch.testing.assert_close(kept.residual, clip.tower(pixels).residual_out, rtol=1e-5, atol=1e-5)
    stream = clip.tower.embed(pixels).detach().requires_grad_()
    for keep_error in (False, True):
        _, version = model.replace(0, stream, "all", keep_error)
        gradient = torch.autograd.grad(version[0, 3].sum(), stream)[0]
        if not keep_error:
            expected = gradient
    assert torch.equal(gradient, expected)
    assert not torch.allclose(gradient[0, 3], torch.ones(32))


def test_mixed_takes_the_chosen_tokens():
    own, replaced = torch.zeros(2, 3, 1), torch.ones(2, 3, 1)
    assert mixed(replaced, own, "all").flatten().tolist() == [1] * 6
    assert mixed(replaced, own, "cls").flatten().tolist() == mixed(replaced[:, :1], own, "cls").flatten().tolist()
    assert mixed(replaced, own, "cls").flatten().tolist() == [1, 0, 0] * 2
    assert mixed(replaced, own, "patches").flatten().tolist() == [0, 1, 1] * 2


def test_what_does_not_fit_is_refused(model, clip, make_pixels):
    with pytest.raises(ValueError, match="is not a window of 2 SAEs"):
        model(make_pixels(1), range(1, 3))
    with pytest.raises(ValueError, match="1 SAEs of width 32, but the tower has 3 blocks"):
        ResidualReplacement(clip.tower, ResidualSaes(SaeArchitecture(32, (8,), (1,), (1,))))
