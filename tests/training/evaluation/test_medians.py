"""Medians of activations and errors over images, against all of them at once."""

import pytest
import torch

from vitrine.training.evaluation.code import Code
from vitrine.training.evaluation.medians import medians


@pytest.mark.parametrize("sparsifier", ["relu_topk", "abs_topk"])
def test_medians_are_those_over_all_images(clip, make_saes, make_pixels, sparsifier):
    saes, pixels = make_saes(clip, k=12, sparsifier=sparsifier), make_pixels(7, seed=8)
    found = medians(clip.tower, saes, lambda: iter(pixels.split(3)), tokens_at_once=5)
    taps = clip.tower(pixels)
    stream = taps.residual_in
    for layer in range(saes.layers):
        stream = stream + taps.attn_out[layer] + taps.mlp_out[layer]
        code = Code(saes, layer, stream)
        torch.testing.assert_close(found.activations[layer], code.values.median(0).values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.errors[layer], code.errors.median(0).values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.streams[layer], stream.median(0).values, rtol=1e-4, atol=1e-5)
        assert found.activations[layer].any(), "some features are active in most images"
    if sparsifier == "abs_topk":
        assert any((of_layer < 0).any() for of_layer in found.activations)
