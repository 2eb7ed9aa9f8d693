"""Directions through whole blocks, MLPs included: against autograd in float64 with what is held fast detached."""

import pytest
import torch
from torch import nn

from libragrad import held_block, in_float64
from vitrine.models.clip.tower import UnsupportedTower
from vitrine.models.graph.gated import GatedSourcesGraph, gates
from vitrine.models.graph.gated_trace import GatedTraceGraph


@pytest.fixture(scope="module")
def shallow(make_clip):
    return make_clip(vision_cfg={"layers": 1})


def check_all_blocks(clip, pixels):
    tower = in_float64(clip)
    pixels = pixels.double()
    outputs = GatedTraceGraph(tower, None)(pixels)
    embedding, _scale, norm, *held = (part[0] for part in outputs)
    taps = tower(pixels)
    z = tower.head(taps.residual_out[0, 0])
    torch.testing.assert_close(embedding, z / z.norm(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(norm, z.norm())
    directions = torch.randn(3, tower.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    contributions, constants = GatedSourcesGraph(tower)(directions, *held)
    streams, x = [], taps.residual_in[0].detach().requires_grad_()
    for block in tower.blocks:
        streams.append(x)
        x = held_block(block, x)
    torch.testing.assert_close(x[0], taps.residual_out[0, 0], rtol=1e-9, atol=1e-9)
    for n, direction in enumerate(directions):
        total = direction @ x[0]
        gradients = torch.autograd.grad(total, streams, retain_graph=True)
        for layer, gradient in enumerate(gradients):
            expected = (streams[layer] * gradient).sum(-1)
            torch.testing.assert_close(contributions[n, layer], expected, rtol=1e-9, atol=1e-9)
            kept = contributions[n, layer].sum() + constants[n, layer:].sum()
            torch.testing.assert_close(kept, total, rtol=1e-9, atol=1e-9)


def test_every_depth_adds_up_in_any_tower(any_clip, make_pixels):
    check_all_blocks(any_clip, make_pixels(1, any_clip.tower.image_size, seed=3))


def test_a_tower_of_one_layer(shallow, make_pixels):
    check_all_blocks(shallow, make_pixels(1, seed=3))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU(approximate="tanh")])
def test_gates_are_the_activation_by_its_argument(activation):
    hidden = torch.tensor([-3.0, -0.5, 0.2, 4.0], dtype=torch.float64)
    torch.testing.assert_close(gates(activation, hidden) * hidden, activation(hidden))
    assert gates(activation, torch.zeros(1)).item() == 0.5


def test_an_activation_without_gates_is_refused():
    with pytest.raises(UnsupportedTower, match="SiLU"):
        gates(nn.SiLU(), torch.zeros(1))
