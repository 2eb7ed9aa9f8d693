"""The fused graph agrees with the CLT on [CLS], for every sparsifier, against the CLT's own code in float64."""

from copy import deepcopy

import pytest
import torch

from vitrine.models.bundle.layout import EVERY_OUTPUT
from vitrine.models.clip.tower import Tower
from vitrine.models.graph.attribution import AttributionGraph

IMAGES = 6


@pytest.fixture(scope="module")
def taps(clip, make_pixels):
    """The tower's taps at [CLS], float64: [L, IMAGES, d] each."""
    tower = Tower(deepcopy(clip.model).double().visual)
    all_taps = tower(make_pixels(IMAGES, seed=7).double())
    return {"mlp_in": all_taps.mlp_in[:, :, 0], "mlp_out": all_taps.mlp_out[:, :, 0]}


def outputs(clip, clt, make_pixels, cls_mean, tables=torch.float32):
    graph = AttributionGraph(clip.tower, clt, cls_mean, tables).eval()
    return dict(zip(EVERY_OUTPUT, graph(make_pixels(IMAGES, seed=7)), strict=True))


def dense(indices, values, features=64):
    """[..., k] -> [..., F]; adds, so that a feature in two places would show."""
    return torch.zeros(*indices.shape[:-1], features, dtype=values.dtype).scatter_add(-1, indices, values)


def cls_codes(clt, mlp_in):
    """The CLT's own code of [CLS] [IMAGES, L, F], in float64."""
    codes = deepcopy(clt).double().encode(mlp_in, torch.ones(IMAGES, dtype=torch.bool))
    return codes, torch.stack([dense(code.indices, code.values) for code in codes], dim=1)


def test_codes_are_those_of_the_clt_outside_training(clip, any_clt, taps, cls_mean, make_pixels):
    result = outputs(clip, any_clt, make_pixels, cls_mean)
    _, expected = cls_codes(any_clt, taps["mlp_in"])
    torch.testing.assert_close(
        dense(result["feature_indices"], result["feature_values"]).double(), expected, rtol=0, atol=1e-5
    )
    assert (expected != 0).sum((0, 2)).min() > 0, "a layer without any active feature shows nothing"
    if any_clt.architecture.sparsifier == "abs_topk":
        assert (expected < 0).any()
        assert ((expected != 0).sum(-1) == torch.tensor(any_clt.architecture.k_cls)).all()


def test_places_are_the_widest_layers(clip, any_clt, cls_mean, make_pixels):
    architecture, result = any_clt.architecture, outputs(clip, any_clt, make_pixels, cls_mean)
    if architecture.sparsifier in ("relu_topk", "abs_topk"):
        expected = max(architecture.k_cls)
    else:
        expected = 2 * max(*architecture.k, *architecture.k_cls)
    assert result["feature_indices"].shape == result["feature_values"].shape == (IMAGES, 3, expected)


@pytest.mark.parametrize("all_places_in_use", [False, True])
def test_rows_and_projection_are_what_the_clt_writes(clip, any_clt, taps, cls_mean, make_pixels, all_places_in_use):
    """Computed with the CLT's decoders, one target at a time."""
    clt = deepcopy(any_clt)
    if all_places_in_use:
        for encoder in clt.encoders:
            encoder.bias += 5
    result = outputs(clip, clt, make_pixels, cls_mean)
    codes, active = cls_codes(clt, taps["mlp_in"])
    if all_places_in_use:
        places = torch.tensor([encoder.sparsifier.inference_places() for encoder in clt.encoders])
        assert ((active != 0).sum(-1) == places).all()
    written = torch.zeros(3, IMAGES, 32, dtype=torch.float64)
    biases = torch.zeros(32, dtype=torch.float64)
    for decoder in deepcopy(clt).double().decoders:
        onto = decoder.contributions(codes)
        written[list(decoder.sources)] += onto
        biases += decoder.bias
    fold, beta = (table.double() for table in clip.tower.fold())
    scale = (result["sigma"] * result["norm"]).double()[:, None]
    rows = result["rows"].double()
    for layer in range(3):
        torch.testing.assert_close(rows[:, 4 + layer] * scale, written[layer] @ fold, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        rows[:, 7] * scale, (biases @ fold).expand(IMAGES, -1) + beta * result["sigma"][:, None], rtol=0, atol=1e-4
    )
    error = taps["mlp_out"].sum(0) - written.sum(0) - biases
    torch.testing.assert_close(rows[:, 8] * scale, error @ fold, rtol=0, atol=1e-4)

    last = onto.sum(0)
    is_written = last.any(-1)
    assert is_written.sum() > IMAGES / 2
    expected = torch.zeros(IMAGES, 3, dtype=torch.float64)
    expected[:, list(decoder.sources)] = ((onto * last).sum(-1) / last.square().sum(-1)).nan_to_num().T
    torch.testing.assert_close(result["projection"].double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(result["projection"].sum(-1), is_written.float())
    if not clt.architecture.cross_layer:
        assert list(decoder.sources) == [2]


def test_float16_tables_are_the_rounded_clt(clip, any_clt, taps, cls_mean, make_pixels):
    """Encoders, biases and thresholds: the code is that of a CLT whose numbers are halves."""
    rounded = deepcopy(any_clt)
    for encoder in rounded.encoders:
        for tensor in (encoder.weight, encoder.bias):
            tensor.copy_(tensor.half().float())
        if (threshold := getattr(encoder.sparsifier, "log_threshold", None)) is not None:
            threshold.copy_(threshold.double().exp().float().half().double().log().float())
        elif (threshold := getattr(encoder.sparsifier, "thresholds", None)) is not None:
            threshold.copy_(threshold.half().float())
    result = outputs(clip, any_clt, make_pixels, cls_mean, torch.float16)
    _, expected = cls_codes(rounded, taps["mlp_in"])
    torch.testing.assert_close(
        dense(result["feature_indices"], result["feature_values"]).double(), expected, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(result["rows"].sum(1), result["embedding"], rtol=0, atol=1e-5)


def test_float16_tables_hold_halves(clip, any_clt, cls_mean):
    graph = AttributionGraph(clip.tower, any_clt, cls_mean, torch.float16)
    for table in (*graph.encoders.parameters(), graph.threshold):
        assert table is None or table.equal(table.half().float())
    assert graph.directions.dtype == graph.last_decoders.dtype == torch.float16


def test_per_layer_transcoders_need_no_second_table(clip, any_clt, cls_mean):
    """Only the last layer's own directions write to the last MLP output; cross-layer, two more layers' decoders do."""
    table = AttributionGraph(clip.tower, any_clt, cls_mean, torch.float32).last_decoders
    assert table.shape == ((2 * 64 if any_clt.architecture.cross_layer else 0), 32)


def test_thresholds_are_of_cls_alone(clip, make_clt, cls_mean, make_pixels):
    """BatchTopK's threshold for patches does not affect a served code."""
    clt = make_clt(clip, sparsifier="batch_topk")
    before = outputs(clip, clt, make_pixels, cls_mean)["feature_values"]
    for encoder in clt.encoders:
        encoder.sparsifier.thresholds[0] = 9.0
    torch.testing.assert_close(outputs(clip, clt, make_pixels, cls_mean)["feature_values"], before, rtol=0, atol=0)
    for encoder in clt.encoders:
        encoder.sparsifier.thresholds[1] = 9.0
    assert not outputs(clip, clt, make_pixels, cls_mean)["feature_values"].any()


def test_a_batch_topk_whose_threshold_was_never_measured_cuts_nothing_but_negatives(
    clip, make_clt, cls_mean, taps, make_pixels
):
    clt = make_clt(clip, sparsifier="batch_topk")
    for encoder in clt.encoders:
        encoder.sparsifier.thresholds.fill_(-1.0)
    result = outputs(clip, clt, make_pixels, cls_mean)
    _, expected = cls_codes(clt, taps["mlp_in"])
    assert (expected >= 0).all()
    torch.testing.assert_close(
        dense(result["feature_indices"], result["feature_values"]).double(), expected, rtol=0, atol=1e-5
    )


def test_where_nothing_is_active_nothing_is_written(clip, make_clt, cls_mean, make_pixels):
    clt = make_clt(clip, sparsifier="jumprelu")
    for encoder in clt.encoders:
        encoder.bias.fill_(-99.0)
    result = outputs(clip, clt, make_pixels, cls_mean)
    for name in ("feature_values", "projection"):
        assert not result[name].any()
    assert not result["rows"][:, 4:7].any()
    torch.testing.assert_close(result["rows"].sum(1), result["embedding"], rtol=0, atol=1e-5)
    assert all(torch.isfinite(value).all() for value in result.values())


@pytest.mark.parametrize("cross_layer", [True, False])
def test_a_tower_of_one_layer(make_clip, make_clt, make_pixels, cross_layer):
    clip = make_clip(vision_cfg={"layers": 1})
    clt = make_clt(clip, cross_layer=cross_layer)
    result = outputs(clip, clt, make_pixels, torch.zeros(1, 32))
    torch.testing.assert_close(result["projection"], torch.ones(IMAGES, 1))
    torch.testing.assert_close(result["rows"].sum(1), result["embedding"], rtol=0, atol=1e-5)
