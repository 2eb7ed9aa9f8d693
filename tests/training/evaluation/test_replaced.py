"""What windows share changes nothing: against the replacement model itself."""

import pytest
import torch

from vitrine.models.account.windows import TOKENS
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.replacement import Replacement
from vitrine.training.evaluation.replaced import Known, Replaced

WINDOWS = [range(3), range(1, 3), range(2, 3), range(2), range(1, 2), range(1)]


def known_of(clip, clt, pixels, starts):
    taps = clip.tower(pixels)
    known = Known(taps, clt.encode(taps.mlp_in.flatten(1, 2), torch.arange(17).eq(0).repeat(len(pixels))))
    for target, decoder in enumerate(clt.decoders):
        known.add(target, decoder.bias, decoder.sources, decoder.contributions(known.codes), starts)
    return known


@pytest.mark.parametrize("cross_layer", [True, False])
@pytest.mark.parametrize("sparsifier", ["relu_topk", "batch_topk"])
def test_it_is_the_replacement_model(clip, make_clt, make_pixels, sparsifier, cross_layer):
    clt = make_clt(clip, k=8, k_cls=5, sparsifier=sparsifier, cross_layer=cross_layer).eval()
    pixels = make_pixels(3)
    known = known_of(clip, clt, pixels, {0, 1, 2})
    model, replaced = Replacement(clip.tower, clt), Replaced(clip.tower, clt)
    for window in WINDOWS:
        for tokens in TOKENS:
            expected = model(pixels, window, tokens).residual[:, 0]
            torch.testing.assert_close(replaced(known, window, tokens), expected, rtol=1e-4, atol=1e-5)


def test_what_clip_computes_itself_is_decoded_once(clip, make_clt, make_pixels):
    clt = make_clt(clip)
    known = known_of(clip, clt, make_pixels(2), {1})
    for target in range(3):
        expected = clt.decode(known.codes)[target].view(2, 17, -1)
        torch.testing.assert_close(known.decoded[target], expected)
    assert known.written.keys() == {(1, 2)}


def test_layers_up_to_a_window_are_not_run_again(clip, make_clt, make_pixels, monkeypatch):
    clt = make_clt(clip)
    known, ran, own = known_of(clip, clt, make_pixels(2), {0, 1, 2}), [], Tower.attention

    def attention(tower, layer, stream, cls_only=False):
        ran.append((layer, cls_only))
        return own(tower, layer, stream, cls_only)

    monkeypatch.setattr(Tower, "attention", attention)
    for window in (range(3), range(1, 3), range(2, 3)):
        Replaced(clip.tower, clt)(known, window, "all")
    assert ran == [(1, False), (2, True), (2, True)]
