"""Interventions in features of residual SAEs, against a plain float64 loop over the tower."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.layout import ALWAYS
from vitrine.models.dictionary.average import mean_residual_code
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.residual_rerun import ResidualRerunGraph
from vitrine.models.interventions.batch import stacked
from vitrine.models.interventions.changes import Changes


def dense(code, features):
    return torch.zeros(len(code.indices), features, dtype=code.values.dtype).scatter_add(1, code.indices, code.values)


@pytest.fixture
def changes(clip):
    """Two features of each SAE and one direction after the second block, at some tokens."""
    tower, generator = clip.tower, np.random.default_rng(0)
    layers, tokens = tower.layers, tower.tokens

    def noise(*shape):
        return (generator.normal(size=shape) * (generator.random(shape) < 0.7)).astype(np.float32)

    u = generator.normal(size=(1, tower.width))
    return Changes(
        dictionary="residual",
        layers=np.array([0, 0, 1, 1]),
        indices=np.array([2, 47, 63, 5]),
        gains=noise(4, tokens),
        offsets=noise(4, tokens),
        places=np.array([2]),
        directions=(u / np.linalg.norm(u)).astype(np.float32),
        direction_gains=noise(1, tokens),
        direction_offsets=noise(1, tokens),
        heads=1 + noise(layers, 4, tokens),
        attention=1 + noise(layers, tokens),
        mlp=1 + noise(layers, tokens),
        clt=np.ones(layers, np.float32),
    )


def by_hand(tower, saes, pixels, changes):
    """[CLS] before ln_post [d] of one image, and what was added to it [d]."""
    tower, saes = deepcopy(tower).double(), deepcopy(saes).double()
    is_cls = torch.arange(tower.tokens) == 0
    part = {name: torch.from_numpy(np.asarray(part)).double() for name, part in stacked([changes]).items()}
    stream, added = tower.embed(pixels.double())[0], torch.zeros(tower.width).double()
    for layer, block in enumerate(tower.blocks):
        attn, normed = block.attn, block.ln_1(stream)
        read = normed @ attn.in_proj_weight.T + attn.in_proj_bias
        q, k, v = (of.unflatten(-1, (4, -1)) for of in read.chunk(3, -1))
        weights = (torch.einsum("qhc,khc->hqk", q, k) / attn.head_dim**0.5).softmax(-1)
        by_head = torch.einsum("hqk,khc->qhc", weights, v) * part["heads"][0, layer].T[..., None]
        out = block.ls_1(by_head.flatten(1) @ attn.out_proj.weight.T + attn.out_proj.bias)
        stream = stream + out * part["attention"][0, layer][:, None]
        stream = stream + tower.mlp(layer, stream)[1] * part["mlp"][0, layer][:, None]
        before = stream
        if layer < saes.layers:
            mean, deviation = stream.mean(-1, keepdim=True), stream.std(-1, keepdim=True) + 1e-5
            z = dense(saes.encoders[layer]((stream - mean) / deviation, is_cls), len(saes.encoders[layer].weight))
            for n in np.flatnonzero(changes.layers == layer):
                own = part["gains"][0, n] * z[:, changes.indices[n]] + part["offsets"][0, n]
                before = before + deviation * own[:, None] * saes.decoders[layer].weight[changes.indices[n]]
        after = before
        if layer + 1 == changes.places[0]:
            u = part["directions"][0]
            length = part["direction_gains"][0, 0] * (before @ u) + part["direction_offsets"][0, 0]
            after = before + length[:, None] * u
        added = added + (after - stream)[0]
        stream = after
    return stream[0], added


@torch.no_grad()
@pytest.mark.parametrize("sparsifier", ["relu_topk", "abs_topk", "jumprelu"])
def test_features_of_saes_are_changed(clip, clt, make_saes, make_pixels, changes, sparsifier):
    saes, pixels = make_saes(clip, k_cls=5, sparsifier=sparsifier), make_pixels(1, seed=4)
    vision = AttributionGraph(clip.tower, clt, torch.zeros(3, 32), torch.float32).eval()
    feeds = (torch.from_numpy(np.ascontiguousarray(part)) for part in stacked([changes]).values())
    outputs = ResidualRerunGraph(vision, saes).eval()(pixels, *feeds)
    parts = Decomposition.from_batch(dict(zip(ALWAYS, map(np.asarray, outputs), strict=True)), 0)
    residual, added = by_hand(clip.tower, saes, pixels, changes)
    scale = float(np.abs(parts.components).max())
    np.testing.assert_allclose(parts.components.sum(0), residual, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(parts.components[-1], added, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(parts.rows.sum(0), parts.embedding, atol=1e-5)
    assert added.abs().max() > 0.1


def test_mean_activations(clip, make_saes, make_pixels):
    saes, images = make_saes(clip, k_cls=5), make_pixels(3, seed=1)
    found = mean_residual_code(clip.tower, saes, images.split(2))
    taps, is_cls = clip.tower(images), torch.arange(17) == 0
    for layer in range(2):
        stream = taps.residual_in + (taps.attn_out + taps.mlp_out)[: layer + 1].sum(0)
        standardised = (stream - stream.mean(-1, keepdim=True)) / (stream.std(-1, keepdim=True) + 1e-5)
        codes = [dense(saes.encoders[layer](x, is_cls), saes.features) for x in standardised]
        mean = torch.stack(codes).mean(0)
        torch.testing.assert_close(found[layer], torch.stack([mean[0], mean[1:].mean(0)]), rtol=1e-4, atol=1e-5)
