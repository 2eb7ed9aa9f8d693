"""The two graphs of the source account against autograd in float64, with what is held fast detached."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import with_stored_decoders
from libragrad import held_attention, held_norm, in_float64
from vitrine.models.account.sources import Baseline, Trace, about, accounts
from vitrine.models.bundle.layout import SOURCES_OUTPUTS, TRACE_OUTPUTS
from vitrine.models.dictionary.average import mean_code
from vitrine.models.graph.sources import SourcesGraph, written_by
from vitrine.models.graph.trace import TraceGraph


class Reference:
    """One image's forward pass in float64 in which only what is written has a gradient."""

    def __init__(self, clip, clt, pixels):
        self.tower, self.clt = in_float64(clip), clt
        taps = self.tower(pixels[None].double())
        self.embedded = taps.residual_in[0].detach().requires_grad_()
        self.written = [out[0].detach().requires_grad_() for out in taps.mlp_out]
        self.mlp_in = [x[0].detach() for x in taps.mlp_in]
        self.is_cls = torch.arange(self.tower.tokens) == 0
        stream, self.before_mlp = self.embedded, []
        for block, written in zip(self.tower.blocks, self.written, strict=True):
            stream = stream + held_attention(block, stream)
            self.before_mlp.append(stream)
            stream = stream + written
        self.residual = stream[0]
        self.z = self.tower.head(self.residual).detach()
        self.codes = [encoder(x, self.is_cls) for encoder, x in zip(self.clt.encoders, self.mlp_in, strict=True)]

    def logit(self, label):
        """<label, z / |z|>, with ln_post's denominator and |z| held fast."""
        return held_norm(self.residual, self.tower.visual.ln_post) @ self.tower.visual.proj @ label / self.z.norm()

    def preactivation(self, layer, token, feature):
        x = held_norm(self.before_mlp[layer], self.tower.blocks[layer].ln_2)[token]
        encoder = self.clt.encoders[layer]
        return encoder.weight[feature] @ x + encoder.bias[feature]

    def account(self, target):
        """(embeddings [T], errors [L, T], features: of each source layer [T, k], biases [L], gradients at the MLPs'
        outputs [L, T, d]) of a scalar."""
        grads = torch.autograd.grad(target, [self.embedded, *self.written], retain_graph=True, allow_unused=True)
        grads = [torch.zeros_like(self.embedded) if grad is None else grad for grad in grads]
        embeddings = (self.embedded * grads[0]).sum(-1)
        features = [torch.zeros_like(code.values) for code in self.codes]
        errors, biases = [], []
        for layer, (decoder, gradient) in enumerate(zip(self.clt.decoders, grads[1:], strict=True)):
            left = self.written[layer] - decoder.bias
            for source, weight in zip(decoder.sources, decoder.weights, strict=True):
                code = self.codes[source]
                rows = weight[code.indices]  # [T, k, d]
                features[source] += code.values * (rows * gradient[:, None]).sum(-1)
                left = left - (code.values[..., None] * rows).sum(1)
            errors.append((left * gradient).sum(-1))
            biases.append((decoder.bias * gradient).sum())
        features = [part.detach() for part in features]
        errors, biases = (torch.stack(parts).detach() for parts in (errors, biases))
        return embeddings.detach(), errors, features, biases, torch.stack(grads[1:])


def by_feature(indices, parts, features):
    """[T, k] -> [T, F]"""
    return torch.zeros(len(indices), features, dtype=parts.dtype).scatter_add(1, indices, parts)


def check(clip, clt, pixels):
    reference = Reference(clip, with_stored_decoders(clt), pixels)
    trace = TraceGraph(clip.tower, clt, torch.float32)(pixels[None])
    embedding, scale, norm, *held = (part[0] for part in trace)
    torch.testing.assert_close(embedding.double(), reference.z / reference.z.norm(), rtol=0, atol=1e-5)
    layers, tokens = clip.tower.layers, clip.tower.tokens
    written, values = held[-3], held[-1]
    assert not written[-1, 1:].any()  # nothing reads the last layer's patches
    assert not values[-1, 1:].any()
    torch.testing.assert_close(written[-1, 0].double(), reference.written[-1][0].detach(), rtol=1e-4, atol=1e-4)
    labels = F.normalize(torch.randn(2, clip.tower.embedding, generator=torch.Generator().manual_seed(1)), dim=-1)
    fold, beta = clip.tower.fold()
    directions = labels @ fold.T / scale
    reference.codes[layers - 1]
    nodes = [(layers, 0, 0), (layers, 0, 0)]
    nodes += [
        (layer, token, int(reference.codes[layer].indices[token, 0]))
        for layer in range(layers)
        for token in (0, tokens - 1)
    ]
    layer, token, feature = torch.tensor(nodes).T
    start = torch.cat([directions, torch.zeros(len(nodes) - 2, clip.tower.width)])
    embeddings, errors, constants, features, biases, gradients = SourcesGraph(clip.tower, clt, torch.float32)(
        start, layer, token, feature, *held
    )
    for n, node in enumerate(nodes):
        target = reference.logit(labels[n].double()) if n < 2 else reference.preactivation(*node)
        expected = reference.account(target)
        close = {"rtol": 1e-4, "atol": 2e-4}
        torch.testing.assert_close(embeddings[n].double(), expected[0], **close)
        torch.testing.assert_close(errors[n].double(), expected[1], **close)
        torch.testing.assert_close(biases[n].double(), expected[3], **close)
        by_type = torch.stack([expected[4][:, 0], expected[4][:, 1:].sum(1)], dim=1)
        torch.testing.assert_close(gradients[n].double(), by_type, **close)
        for source in range(layers):
            ours = by_feature(held[-2][source], features[n, source].double(), clt.features)
            theirs = by_feature(reference.codes[source].indices, expected[2][source], clt.features)
            torch.testing.assert_close(ours, theirs, **close)
        constant = constants[n] + (labels[n] @ beta / norm if n < 2 else 0)
        total = embeddings[n].sum() + errors[n].sum() + features[n].sum() + biases[n].sum() + constant
        torch.testing.assert_close(total.double(), target.detach(), rtol=1e-4, atol=1e-4)


def test_sources_of_any_clip(any_clip, make_clt, make_pixels):
    check(any_clip, make_clt(any_clip, k=8, k_cls=12), make_pixels(1, any_clip.tower.image_size, seed=3)[0])


@pytest.mark.parametrize("sparsifier", ["relu_topk", "abs_topk", "jumprelu", "batch_topk"])
@pytest.mark.parametrize("cross_layer", [True, False])
def test_sources_of_any_clt(clip, make_clt, make_pixels, sparsifier, cross_layer):
    check(clip, make_clt(clip, k=(4, 8, 6), sparsifier=sparsifier, cross_layer=cross_layer), make_pixels(1, seed=4)[0])


@pytest.mark.parametrize("cross_layer", [True, False])
def test_about_the_average_picture(clip, make_clt, make_pixels, cross_layer):
    """Every feature's part about the mean, and the two rows that make up for it, by autograd."""
    clt, pixels = make_clt(clip, k=6, k_cls=8, cross_layer=cross_layer), make_pixels(1, seed=5)[0]
    stored = with_stored_decoders(clt)
    reference = Reference(clip, stored, pixels)
    average = mean_code(clip.tower, clt, [make_pixels(3, seed=6)])
    baseline = Baseline(average.numpy(), written_by(clt, average).numpy())
    label = F.normalize(torch.randn(clip.tower.embedding, generator=torch.Generator().manual_seed(1)), dim=-1)
    fold, beta = (part.numpy() for part in clip.tower.fold())
    outputs = TraceGraph(clip.tower, clt, torch.float32)(pixels[None])
    trace = Trace.from_batch(dict(zip(TRACE_OUTPUTS, (part.numpy() for part in outputs), strict=True)), 0)
    start = torch.from_numpy(trace.starts(label.numpy()[None], fold, 1.0))
    last = torch.tensor([clip.tower.layers]), torch.tensor([0]), torch.tensor([0])
    found = SourcesGraph(clip.tower, clt, torch.float32)(start, *last, *(part[0] for part in outputs[3:]))
    found = dict(zip(SOURCES_OUTPUTS, (part.numpy() for part in found), strict=True))
    (plain,) = accounts(trace, found, label.numpy()[None], beta, 1.0)
    sources = about(plain, trace, found["gradients"][0], baseline)
    assert abs(plain.remainder) < 1e-4
    assert abs(sources.remainder) < 1e-4

    gradients = reference.account(reference.logit(label.double()))[-1]  # [L, T, d]
    tokens, types = clip.tower.tokens, torch.arange(clip.tower.tokens).clamp_max(1)
    for source, code in enumerate(reference.codes):
        per_unit = torch.zeros(tokens, clt.features).double()  # what one unit of each feature adds, token by token
        for target, decoder in enumerate(stored.decoders):
            if source in decoder.sources:
                per_unit += gradients[target] @ decoder.weights[source - decoder.sources[0]].T
        mean = average[source].double()[types]  # [T, F]
        dense = torch.zeros_like(per_unit).scatter_add(1, code.indices, code.values)
        active = dense != 0
        close = {"rtol": 1e-4, "atol": 1e-4}
        ours = by_feature(
            code.indices * 0 + torch.from_numpy(sources.indices[source]),
            torch.from_numpy(sources.features[source]).double(),
            clt.features,
        )
        torch.testing.assert_close(ours, torch.where(active, (dense - mean) * per_unit, 0), **close)
        assert sources.baseline[source] == pytest.approx(float((mean * per_unit).sum()), abs=1e-4)
        assert sources.silent[source] == pytest.approx(float(-(mean * per_unit)[~active].sum()), abs=1e-4)
    assert np.abs(sources.silent).max() > 1e-3


def test_mean_code_by_hand(clip, clt, make_pixels):
    """Of two batches of different sizes: the mean over all images, at [CLS] and over all patches."""
    batches = [make_pixels(2, seed=7), make_pixels(1, seed=8)]
    average = mean_code(clip.tower, clt, batches)
    mlp_in = torch.cat([clip.tower(batch).mlp_in for batch in batches], dim=1)  # [L, 3, T, d]
    is_cls = (torch.arange(clip.tower.tokens) == 0).expand(3, -1).flatten()
    for layer, code in enumerate(clt.encode(mlp_in.flatten(1, 2), is_cls)):
        dense = torch.zeros(len(is_cls), clt.features).scatter(1, code.indices, code.values)
        torch.testing.assert_close(average[layer, 0], dense[is_cls].mean(0))
        torch.testing.assert_close(average[layer, 1], dense[~is_cls].mean(0))
