"""The two graphs of the source account against autograd in float64, with what is held fast detached."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from common import with_stored_decoders
from vitrine.models.clip.tower import Tower
from vitrine.models.graph.sources import SourcesGraph
from vitrine.models.graph.trace import TraceGraph


def held_ln(x, ln):
    """A LayerNorm with its denominator held fast."""
    sigma = (x.var(-1, unbiased=False, keepdim=True) + ln.eps).sqrt().detach()
    return (x - x.mean(-1, keepdim=True)) / sigma * ln.weight + ln.bias


def held_attention(block, x):
    """A block's attention with its weights held fast."""
    attn, normed = block.attn, held_ln(x, block.ln_1)
    q, k, v = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)

    def split(t):
        return t.unflatten(-1, (attn.num_heads, -1)).transpose(0, 1)

    weights = (split(q) @ split(k).transpose(-1, -2) * attn.head_dim**-0.5).softmax(-1).detach()
    mixed = (weights @ split(v)).transpose(0, 1).flatten(1)
    return block.ls_1(F.linear(mixed, attn.out_proj.weight, attn.out_proj.bias))


class Reference:
    """One image's forward pass in float64 in which only what is written has a gradient."""

    def __init__(self, clip, clt, pixels):
        self.tower, self.clt = Tower(deepcopy(clip.model).double().visual), clt
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
        return held_ln(self.residual, self.tower.visual.ln_post) @ self.tower.visual.proj @ label / self.z.norm()

    def preactivation(self, layer, token, feature):
        x = held_ln(self.before_mlp[layer], self.tower.blocks[layer].ln_2)[token]
        encoder = self.clt.encoders[layer]
        return encoder.weight[feature] @ x + encoder.bias[feature]

    def account(self, target):
        """(embeddings [T], errors [L, T], features: of each source layer [T, k], biases [L]) of a scalar."""
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
        return embeddings.detach(), torch.stack(errors).detach(), [f.detach() for f in features], torch.stack(biases)


def by_feature(indices, parts, features):
    """[T, k] -> [T, F]"""
    return torch.zeros(len(indices), features, dtype=parts.dtype).scatter_add(1, indices, parts)


def check(clip, clt, pixels):
    reference = Reference(clip, with_stored_decoders(clt), pixels)
    trace = TraceGraph(clip.tower, clt, torch.float32)(pixels[None])
    embedding, scale, norm, *held = (part[0] for part in trace)
    torch.testing.assert_close(embedding.double(), reference.z / reference.z.norm(), rtol=0, atol=1e-5)
    layers, tokens = clip.tower.layers, clip.tower.tokens
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
    embeddings, errors, constants, features, biases = SourcesGraph(clip.tower, clt, torch.float32)(
        start, layer, token, feature, *held
    )
    for n, node in enumerate(nodes):
        target = reference.logit(labels[n].double()) if n < 2 else reference.preactivation(*node)
        expected = reference.account(target)
        close = {"rtol": 1e-4, "atol": 2e-4}
        torch.testing.assert_close(embeddings[n].double(), expected[0], **close)
        torch.testing.assert_close(errors[n].double(), expected[1], **close)
        torch.testing.assert_close(biases[n].double(), expected[3], **close)
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
