"""Nodes of residual SAEs: rankings against plain sums and finite differences, runs against hooks by hand, curves."""

import pytest
import torch
import torch.nn.functional as F

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.residual_replacement import ResidualReplacement
from vitrine.models.dictionary.residual_sae import standardise
from vitrine.training.evaluation.code import Code
from vitrine.training.evaluation.curves import Curves
from vitrine.training.evaluation.medians import medians
from vitrine.training.evaluation.relevance import Relevance
from vitrine.training.evaluation.residual_nodes import SAE_RANKINGS, residual_nodes, stream_gradients

CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(scope="module")
def saes(clip, make_saes):
    return make_saes(clip, k=10)


@pytest.fixture(scope="module")
def usual(clip, saes, make_pixels):
    return medians(clip.tower, saes, lambda: iter([make_pixels(6, seed=9)]))


@pytest.fixture(scope="module")
def direction(clip):
    return F.normalize(torch.randn(clip.tower.embedding, generator=torch.Generator().manual_seed(1)), dim=-1)


def by_layer(saes, flat):
    """[N] -> of each layer ([F] of features, its error)."""
    parts = flat.split([features + 1 for features in saes.architecture.features])
    return [(part[:-1], part[-1]) for part in parts]


@torch.no_grad()
def codes_of(clip, saes, pixels):
    taps = clip.tower(pixels)
    streams = [
        taps.residual_in + taps.attn_out[: layer + 1].sum(0) + taps.mlp_out[: layer + 1].sum(0)
        for layer in range(saes.layers)
    ]
    return [Code(saes, layer, stream) for layer, stream in enumerate(streams)]


def test_rankings_by_hand(clip, saes, usual, make_pixels, direction):
    nodes, by_token, neurons = residual_nodes(clip, saes, usual)
    pixels = make_pixels(1, seed=2)
    scores, active, everything = nodes.ranked(pixels, direction)
    of_tokens, of_neurons = by_token.ranked(pixels, direction), neurons.ranked(pixels, direction)
    assert tuple(scores) == SAE_RANKINGS
    assert torch.cat([everything, of_tokens.everything, of_neurons.everything, of_neurons.active]).all()
    codes = codes_of(clip, saes, pixels)
    model = ResidualReplacement(clip.tower, saes)
    true = stream_gradients(model, pixels, direction * clip.logit_scale, leaf_error=False)[0]
    held = {
        leaf: {
            part.layer: part
            for part in Relevance(clip.tower, saes, usual, leaf_error=leaf)(
                pixels, (direction * clip.logit_scale)[None]
            )
        }
        for leaf in (True, False)
    }
    for layer, code in enumerate(codes):
        parts = {name: by_layer(saes, of_nodes)[layer] for name, of_nodes in scores.items()}
        fires = (code.values != 0).any(1)[0]
        assert torch.equal(by_layer(saes, active)[layer][0], fires)
        assert by_layer(saes, active)[layer][1]
        torch.testing.assert_close(parts["activation"][0], code.values.sum(1)[0], **CLOSE)
        lengths = (code.errors / code.scale).norm(dim=-1).sum()
        torch.testing.assert_close(parts["activation"][1], lengths, **CLOSE)
        product = code.values * ((true[layer] * code.scale) @ code.decoder.weight.T)
        torch.testing.assert_close(parts["gradient"][0], product.sum(1)[0], **CLOSE)
        torch.testing.assert_close(parts["gradient"][1], (true[layer] * code.errors).sum(), **CLOSE)
        for name, leaf in (("relevance", True), ("through_errors", False)):
            torch.testing.assert_close(torch.cat([parts[name][0], parts[name][1][None]]), held[leaf][layer].nodes[0])
        errors = usual.errors[layer]
        plain = stream_gradients(model, pixels, direction * clip.logit_scale, leaf_error=True)[0][layer]
        torch.testing.assert_close(parts["plain"][1], (plain * (code.errors - errors)).sum(), **CLOSE)
    sizes = [17 * (features + 1) for features in saes.architecture.features]
    for layer, part in enumerate(of_tokens.scores["tokens"].split(sizes)):
        summed = part.view(17, -1).sum(0)
        torch.testing.assert_close(summed, held[True][layer].nodes[0], **CLOSE)
    assert int(of_tokens.active.sum()) == sum(int(code.active.sum()) + 17 for code in codes)
    # Channels, like features, errors and bias together, are the whole stream.
    assert of_neurons.scores["neurons"].shape == (saes.layers * saes.width,)
    for layer, part in enumerate(of_neurons.scores["neurons"].chunk(saes.layers)):
        of_layer = held[False][layer]
        whole = of_layer.features.sum() + of_layer.errors.sum() + of_layer.bias + of_layer.baseline
        walk = Relevance(clip.tower, saes).walk(pixels, (direction * clip.logit_scale)[None])
        while walk.layer > layer:
            walk.back()
        torch.testing.assert_close(part.sum(), (whole - (walk.gradient * usual.streams[layer]).sum())[0], **CLOSE)


@torch.no_grad()
def test_runs_by_hand(clip, saes, usual, make_pixels):
    """The stream after each block rebuilt from activations and error, some of them at their medians."""
    nodes, by_token, neurons = residual_nodes(clip, saes, usual)
    tower, generator = clip.tower, torch.Generator().manual_seed(4)
    embedded = tower.embed(make_pixels(3, seed=2))
    features = saes.architecture.features
    at_tokens = [torch.rand(3, 17, count + 1, generator=generator) < 0.3 for count in features]
    everywhere = [mask[:, :1].expand_as(mask) for mask in at_tokens]
    channels = torch.rand(3, saes.layers * saes.width, generator=generator) < 0.3
    for kind, masks, edited in (
        (nodes, everywhere, torch.cat([mask[:, 0] for mask in everywhere], dim=1)),
        (by_token, at_tokens, torch.cat([mask.flatten(1) for mask in at_tokens], dim=1)),
        (neurons, None, channels),
    ):
        stream = embedded
        for layer in range(tower.layers):
            stream = stream + tower.attention(layer, stream)
            stream = stream + tower.mlp(layer, stream)[1]
            if layer < saes.layers and masks is None:
                mask = channels.chunk(saes.layers, dim=1)[layer][:, None].expand_as(stream)
                stream = torch.where(mask, usual.streams[layer].expand_as(stream), stream)
            elif layer < saes.layers:
                x, code = standardise(stream), Code(saes, layer, stream)
                z = torch.where(masks[layer][..., :-1], usual.activations[layer].expand_as(code.values), code.values)
                error = torch.where(masks[layer][..., -1:], usual.errors[layer].expand_as(stream), code.errors)
                stream = x.undone(z @ code.decoder.weight + code.decoder.bias) + error
        torch.testing.assert_close(kind.run(embedded, edited), stream[:, 0], **CLOSE)
        torch.testing.assert_close(kind.run(embedded, edited & False), tower(make_pixels(3, seed=2)).residual_out[:, 0])


@pytest.mark.parametrize("leaf_error", [True, False])
def test_true_gradients_are_finite_differences(any_clip, make_saes, make_pixels, leaf_error):
    """In float64, the errors of later SAEs held fast or not."""
    tower = Tower(any_clip.model.double().visual)
    saes = make_saes(any_clip, k=10).double()
    try:
        model, pixels = ResidualReplacement(tower, saes), make_pixels(1, tower.image_size).double()
        u = torch.randn(tower.embedding, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        gradients, streams = stream_gradients(model, pixels, u, leaf_error=leaf_error)
        own = [Code(saes, layer, stream).errors for layer, stream in enumerate(streams)]
        step = torch.randn(tower.width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            for layer in range(saes.layers):
                ends = []
                for sign in (1, -1):
                    stream = streams[layer].clone()
                    stream[:, 1] += sign * 1e-6 * step
                    for after in range(layer + 1, tower.layers):
                        stream = model.block(after, stream)
                        if leaf_error and after < saes.layers:
                            stream = model.replace(after, stream, "all")[1] + own[after]
                    ends.append(float(F.normalize(tower.head(stream[0, 0]), dim=-1) @ u))
                expected = (ends[0] - ends[1]) / 2e-6
                assert float(gradients[layer][0, 1] @ step) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    finally:
        any_clip.model.float()


def test_curves_of_all_kinds_begin_and_end_together(clip, saes, usual, recipe, make_pixels):
    labels = clip.encode_labels(list(recipe.data.labels), list(recipe.data.templates))
    curves = Curves(clip, labels, residual_nodes(clip, saes, usual))
    for seed in (2, 3):
        curves.update(make_pixels(1, seed=seed))
    figures = curves.figures()
    assert [curve.ranking for curve in figures.curves] == [*SAE_RANKINGS, "tokens", "neurons"]
    for curve in figures.curves:
        assert curve.deletion[-1] == curve.insertion[0]  # everything is at its median
        assert curve.deletion[0].above_mean.value == pytest.approx(1, abs=1e-5)
        assert curve.insertion[-1].above_mean.value == pytest.approx(1, abs=1e-5)
        none, some = (curve.insertion[at].above_mean.value for at in (0, 5))
        assert curve.regained.value == pytest.approx((some - none) / (1 - none), abs=1e-4)
    assert figures.curve("neurons").active == saes.layers * saes.width
    ends = [figures.curve(name).insertion[0].above_mean.value for name in ("relevance", "tokens", "neurons")]
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)
    assert ends[0] != pytest.approx(ends[2], abs=1e-5)
