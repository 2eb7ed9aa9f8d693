"""A CLT that starts as the MLPs' own neurons."""

import copy
from dataclasses import replace

import pytest
import torch

from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.training.data.activations import Activations
from vitrine.training.data.normalisation import Normalisation
from vitrine.training.run.neurons import start_from_neurons


@pytest.fixture
def batch(clip, make_pixels):
    return Activations.of(clip.tower(make_pixels(8, seed=3)))


@pytest.fixture
def normalisation(batch):
    return Normalisation.estimate([batch])


def started(clip, normalisation, batch, features, k, sparsifier="relu_topk", cross_layer=True):
    tower = clip.tower
    budgets = (k,) * tower.layers
    clt = CrossLayerTranscoder(
        Architecture(tower.layers, tower.width, features, budgets, budgets, sparsifier, cross_layer)
    )
    clt.initialise(torch.Generator().manual_seed(0))
    start_from_neurons(clt, tower, normalisation, batch)
    return clt


def explained(clt, normalisation, batch):
    """1 - unexplained share of variance [L]."""
    truth, output = normalisation.targets(batch.mlp_out), clt(normalisation.inputs(batch.mlp_in), batch.is_cls)[1]
    centred = truth - truth.mean(1, keepdim=True)
    return 1 - (truth - output).square().sum((1, 2)) / centred.square().sum((1, 2))


@pytest.mark.parametrize("cross_layer", [True, False])
def test_with_a_place_for_every_neuron_it_is_the_mlp_with_relu(clip, normalisation, batch, cross_layer):
    """Up to a constant: the mean of what GELU has below 0 goes into the biases."""
    hidden = len(clip.tower.neurons(0)[0])
    clt = started(clip, normalisation, batch, features=hidden, k=hidden, cross_layer=cross_layer)
    folded = normalisation.fold_into(clt)
    mlps = [copy.deepcopy(block.mlp) for block in clip.tower.blocks]
    for mlp in mlps:
        mlp.gelu = torch.nn.ReLU()
    truth = torch.stack([mlp(x) for mlp, x in zip(mlps, batch.mlp_in, strict=True)])
    output = folded(batch.mlp_in, batch.is_cls)[1]
    shift = (truth - output).mean(1, keepdim=True)
    torch.testing.assert_close(output + shift, truth, rtol=0, atol=1e-4)


def test_it_explains_more_than_random_weights_and_the_more_the_larger_k(clip, normalisation, batch):
    random = CrossLayerTranscoder(Architecture(clip.tower.layers, clip.tower.width, 160, (32,) * 3, (32,) * 3))
    random.initialise(torch.Generator().manual_seed(0))
    few, many = (explained(started(clip, normalisation, batch, 160, k), normalisation, batch) for k in (16, 64))
    assert (few > explained(random, normalisation, batch) + 0.3).all()
    assert (many > few).all()


def test_of_more_neurons_than_features_those_that_write_most_are_taken(clip, normalisation, batch):
    clt, features = started(clip, normalisation, batch, features=40, k=8), 40
    for layer, encoder in enumerate(clt.encoders):
        reads, biases, writes = clip.tower.neurons(layer)
        written = (batch.mlp_in[layer] @ reads.T + biases).relu().mean(0) * writes.norm(dim=-1)
        chosen = written.topk(features).indices
        directions = torch.nn.functional.normalize(writes[chosen], dim=-1)
        torch.testing.assert_close(clt.decoders[layer].weights[-1], directions)
        raw = normalisation.fold_into(clt).encoders[layer]
        expected = (batch.mlp_in[layer] @ reads[chosen].T + biases[chosen]) * writes[chosen].norm(dim=-1)
        scale = normalisation.out_scale[layer]
        torch.testing.assert_close(batch.mlp_in[layer] @ raw.weight.T + raw.bias, expected / scale, rtol=0, atol=1e-3)
        assert len(encoder.weight) == features


def test_biases_bring_the_mean_to_that_of_the_tokens_that_are_no_outliers(clip, normalisation, batch):
    batch.mlp_out[1, 5] *= 100
    normalisation = replace(normalisation, outlier_norm=5 * batch.mlp_out.norm(dim=-1).median(1).values)
    clt = started(clip, normalisation, batch, features=160, k=16)
    missing = normalisation.targets(batch.mlp_out) - clt(normalisation.inputs(batch.mlp_in), batch.is_cls)[1]
    missing[1, 5] = 0
    torch.testing.assert_close(missing.mean(1), torch.zeros(clip.tower.layers, clip.tower.width), rtol=0, atol=1e-5)
