"""Effects of features against finite differences in the running network."""

import numpy as np
import pytest
import torch

from vitrine.models.graph.rerun import RerunGraph
from vitrine.models.graph.residual_rerun import ResidualRerunGraph
from vitrine.models.interventions.batch import stacked
from vitrine.models.interventions.changes import Changes
from vitrine.training.planted.truth import Pair, effects, find_truth

STEP = 1e-2


@pytest.fixture(scope="module")
def pair(make_pixels):
    return Pair(make_pixels(1, seed=1), make_pixels(1, seed=2))


@pytest.fixture(scope="module")
def direction(clip):
    return 10 * torch.randn(clip.tower.embedding, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["clt", "residual"])
def dictionary(request, clip, clt, make_saes):
    return clt if request.param == "clt" else make_saes(clip)


def shifted(vision, dictionary, layer, index, offsets):
    """pixels -> embeddings [B, D] of the running network with offsets [T] added to one feature."""
    tower, tokens = vision.tower, vision.tower.tokens
    none = np.zeros((0, tokens), np.float32)
    changes = Changes(
        dictionary="clt",
        layers=np.array([layer]),
        indices=np.array([index]),
        gains=np.zeros((1, tokens), np.float32),
        offsets=offsets[None].astype(np.float32),
        places=np.zeros(0, np.int64),
        directions=np.zeros((0, tower.width), np.float32),
        direction_gains=none,
        direction_offsets=none,
        heads=np.ones((tower.layers, 4, tokens), np.float32),
        attention=np.ones((tower.layers, tokens), np.float32),
        mlp=np.ones((tower.layers, tokens), np.float32),
        clt=np.ones(tower.layers, np.float32),
    )
    if hasattr(dictionary, "directions"):
        running = RerunGraph(vision, dictionary, torch.float32).eval()
    else:
        running = ResidualRerunGraph(vision, dictionary).eval()
    return lambda pixels: running(pixels, *map(torch.from_numpy, stacked([changes]).values()))[0]


def activations(clip, dictionary, pixels, layer):
    """[T, F] of one image, read by hand."""
    taps = clip.tower(pixels)
    if hasattr(dictionary, "directions"):
        read = taps.mlp_in[layer][0]
    else:
        stream = taps.residual_in + (taps.attn_out + taps.mlp_out)[: layer + 1].sum(0)
        read = (stream[0] - stream[0].mean(-1, keepdim=True)) / (stream[0].std(-1, keepdim=True) + 1e-5)
    code = dictionary.encoders[layer](read, torch.arange(len(read)) == 0)
    empty = torch.zeros(len(read), len(dictionary.encoders[layer].weight))
    return empty.scatter_(1, code.indices, code.values)


@torch.no_grad()
def test_an_effect_is_what_a_small_part_of_the_change_does(clip, graph, dictionary, pair, direction):
    with torch.enable_grad():
        found = effects(clip.tower, dictionary, pair, direction)[0].double()
    layer, index = divmod(int(found.abs().argmax()), found.shape[1])
    z, z0 = (activations(clip, dictionary, pixels, layer)[:, index] for pixels in pair)
    step = STEP * (z - z0).numpy()
    margins = [
        (shifted(graph, dictionary, layer, index, sign * step)(pair.with_cue).double() @ direction.double()).item()
        for sign in (1, -1)
    ]
    assert (margins[0] - margins[1]) / (2 * STEP) == pytest.approx(found[layer, index].item(), rel=2e-2)


def test_the_strongest_come_first_and_the_cue_itself_is_measured(clip, clt, pair, direction):
    truth = find_truth(clip.tower, clt, [pair, pair], direction)
    values = [carrier.effect for carrier in truth.carriers]
    assert values == sorted(values, reverse=True)
    assert len(values) == 20
    assert truth.features == clt.layers * clt.features
    embedded = [clip.model.encode_image(pixels, normalize=True) @ direction for pixels in pair]
    assert truth.shift == pytest.approx((embedded[0] - embedded[1]).item(), rel=1e-4)
    found = effects(clip.tower, clt, pair, direction)[0]
    first = truth.carriers[0]
    assert first.effect == pytest.approx(found.max().item(), rel=1e-5)
    assert found[first.layer, first.index] == found.max()


def test_the_same_photo_twice_has_no_cue(clip, dictionary, pair, direction):
    none = effects(clip.tower, dictionary, Pair(pair.without, pair.without), direction)
    assert none.abs().max() < 1e-4 * effects(clip.tower, dictionary, pair, direction).abs().max()
