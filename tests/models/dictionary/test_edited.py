"""The running network with features at their means: against dense sums, layer by layer."""

import pytest
import torch

from vitrine.models.dictionary.average import mean_code
from vitrine.models.dictionary.edited import Edited


@pytest.fixture
def mean(clip, clt, make_pixels):
    return mean_code(clip.tower, clt, [make_pixels(4, seed=9)])


def dense(code, features):
    return torch.zeros(len(code.indices), features).scatter_add(1, code.indices, code.values)


def by_definition(clip, clt, pixels, mean, edited):
    """[CLS] of one image with the features `edited` [L, F] at their means, by dense codes."""
    tower, tokens = clip.tower, clip.tower.tokens
    is_cls, types = torch.arange(tokens) == 0, torch.arange(tokens).clamp_max(1)
    stream, differences = tower.embed(pixels), []
    for layer in range(tower.layers):
        stream = stream + tower.attention(layer, stream)
        mlp_in, mlp_out = tower.mlp(layer, stream)
        z = dense(clt.encoders[layer](mlp_in[0], is_cls), clt.features)
        differences.append(torch.where(edited[layer], mean[layer][types] - z, 0))
        stream = stream + mlp_out
        for source, weight in zip(clt.decoders[layer].sources, clt.decoders[layer].weights, strict=True):
            stream = stream + differences[source] @ weight
    return stream[:, 0]


@pytest.mark.parametrize("cross_layer", [True, False])
@pytest.mark.parametrize("sparsifier", ["relu_topk", "abs_topk", "jumprelu", "batch_topk"])
def test_edited_features_have_their_means(clip, make_clt, make_pixels, sparsifier, cross_layer):
    clt = make_clt(clip, k=6, k_cls=9, sparsifier=sparsifier, cross_layer=cross_layer).eval()
    mean = mean_code(clip.tower, clt, [make_pixels(4, seed=9)])
    pixels = make_pixels(1, seed=2)
    generator = torch.Generator().manual_seed(3)
    edited = torch.rand(3, clt.layers, clt.features, generator=generator) < torch.tensor([0.1, 0.5, 1.0])[:, None, None]
    found = Edited(clip.tower, clt, mean)(clip.tower.embed(pixels).expand(3, -1, -1), edited)
    with torch.no_grad():
        expected = torch.cat([by_definition(clip, clt, pixels, mean, of_run) for of_run in edited])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    own = clip.tower(pixels).residual_out[:, 0]
    assert ((found - own).norm(dim=-1) > 1e-2 * own.norm()).all()  # each edit does something


def test_no_edit_changes_nothing(clip, clt, make_pixels, mean):
    pixels = make_pixels(2)
    none = torch.zeros(2, clt.layers, clt.features, dtype=torch.bool)
    found = Edited(clip.tower, clt, mean)(clip.tower.embed(pixels), none)
    torch.testing.assert_close(found, clip.tower(pixels).residual_out[:, 0], rtol=1e-5, atol=1e-5)


def test_a_silent_feature_gets_its_mean_too(clip, clt, make_pixels):
    """A mean that no picture has: every token gets it, [CLS] and patches their own."""
    pixels, mean = make_pixels(1), torch.zeros(clt.layers, 2, clt.features)
    taps = clip.tower(pixels)
    code = clt.encode(taps.mlp_in[:, 0], torch.arange(clip.tower.tokens) == 0)[clt.layers - 1]
    silent = next(f for f in range(clt.features) if f not in code.indices)
    mean[-1, :, silent] = torch.tensor([2.0, 3.0])
    edited = torch.zeros(1, clt.layers, clt.features, dtype=torch.bool)
    edited[0, -1, silent] = True
    found = Edited(clip.tower, clt, mean)(clip.tower.embed(pixels), edited)
    expected = taps.residual_out[:, 0] + 2 * clt.decoders[-1].weights[-1][silent]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
