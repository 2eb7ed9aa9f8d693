"""C_{i->j}, by hand and against loops over tokens."""

import pytest
import torch

from vitrine.training.evaluation.contributions import ScoreMean, add_codes, by_type, centre_, mean_contributions

CLS_OF_FOUR = torch.tensor([True, False, True, False])


def test_a_token_that_nothing_writes_to_is_left_out():
    parts = torch.zeros(2, 4, 3)
    parts[0, 0] = 1.0
    parts[1, 1] = 2.0
    score_mean = ScoreMean(2)
    score_mean.update(1, [0, 1], parts, CLS_OF_FOUR)
    assert score_mean.matrix("cls")[1].tolist() == [1, 0]
    assert score_mean.matrix("patches")[1].tolist() == [0, 1]
    assert score_mean.matrix("all")[1].tolist() == [0.5, 0.5]
    assert score_mean.matrix("all")[0].tolist() == [0, 0]


def test_by_type_by_hand():
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 1.0, 1.0, 0.0]])
    assert by_type(values, CLS_OF_FOUR).tolist() == [[5, 1], [10, 1]]


def test_centring_takes_each_type_s_own_mean():
    parts = torch.arange(8.0).view(2, 4, 1)
    means = torch.tensor([[[1.0], [10.0]], [[100.0], [1000.0]]])  # [type, source, d]
    result = centre_(parts, means, CLS_OF_FOUR)
    assert result[0, :, 0].tolist() == [-1, 1 - 100, 2 - 1, 3 - 100]
    assert result[1, :, 0].tolist() == [4 - 10, 5 - 1000, 6 - 10, 7 - 1000]


@pytest.mark.parametrize("cross_layer", [True, False])
@pytest.mark.parametrize("sparsifier", ["relu_topk", "abs_topk"])
def test_mean_codes_give_mean_contributions(clip, make_clt, make_pixels, sparsifier, cross_layer):
    clt = make_clt(clip, sparsifier=sparsifier, cross_layer=cross_layer)
    taps = clip.tower(make_pixels(4))
    is_cls = torch.arange(17).eq(0).repeat(4)
    codes = clt.encode(taps.mlp_in.flatten(1, 2), is_cls)
    sums = torch.zeros(2, clt.layers, clt.features, dtype=torch.float64)
    add_codes(sums, codes, is_cls)
    means = mean_contributions(clt, sums / by_type(torch.ones(68), is_cls)[:, None, None])
    for decoder, mean in zip(clt.decoders, means, strict=True):
        parts = decoder.contributions(codes)
        expected = torch.stack([parts[:, is_cls].mean(1), parts[:, ~is_cls].mean(1)])
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
