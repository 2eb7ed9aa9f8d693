"""Relevance of residual SAEs' features: against autograd in float64 through the network with its SAEs in place."""

import pytest
import torch

from libragrad import held_block, held_norm, in_float64
from vitrine.training.evaluation.relevance import Kept, Medians, Relevance

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


class Saed:
    """One image's forward pass in which the stream after each block is put together from activations and error, both
    leaves for autograd's questions; the errors are made of the stream again unless they are leaves."""

    def __init__(self, tower, saes, pixels, *, leaf_error, kept=None):
        self.tower, self.activations, self.errors, self.activities = tower, [], [], []
        x = tower.embed(pixels[None])[0].detach()
        is_cls = torch.arange(tower.tokens) == 0
        for layer, block in enumerate(tower.blocks):
            x = held_block(block, x)
            if layer < saes.layers:
                encoder, decoder = saes.encoders[layer], saes.decoders[layer]
                scale = x.std(-1, keepdim=True).detach() + 1e-5
                standard = (x - x.mean(-1, keepdim=True)) / scale
                code = encoder(standard.detach(), is_cls)
                gate = torch.zeros(tower.tokens, len(decoder.weight), dtype=torch.bool)
                gate.scatter_(1, code.indices, code.values != 0)
                z = (standard @ encoder.weight.T + encoder.bias) * gate
                said = (z @ decoder.weight + decoder.bias) * scale + x.mean(-1, keepdim=True)
                error = x - said
                if leaf_error or (kept and not kept[layer].error):
                    error = error.detach().requires_grad_()
                if kept:
                    through = kept[layer].features
                    z = torch.where(through, z, z.detach().requires_grad_())
                z, error = z + torch.zeros_like(z).requires_grad_(), error + torch.zeros_like(error).requires_grad_()
                self.activations.append(z)
                self.errors.append(error)
                x = (z @ decoder.weight + decoder.bias) * scale + x.mean(-1, keepdim=True) + error
        self.out = x

    def logit(self, direction):
        z = self.tower.head(self.out[0].detach())
        return held_norm(self.out[0], self.tower.visual.ln_post) @ self.tower.visual.proj @ direction / z.norm()


def direction_of(tower):
    return 100 * torch.randn(tower.embedding, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def random_medians(saes, tokens):
    generator = torch.Generator().manual_seed(5)
    shapes = [(tokens, features) for features in saes.architecture.features]
    activations = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    shape = 2, saes.layers, tokens, saes.width
    return Medians(activations, *torch.randn(shape, generator=generator, dtype=torch.float64))


def check(clip, saes, pixels, *, leaf_error, hierarchical=False, with_medians=True):
    tower, saes, pixels = in_float64(clip), saes.double(), pixels.double()
    medians = random_medians(saes, tower.tokens) if with_medians else None
    direction = direction_of(tower)
    kept = [Kept(torch.arange(n) % 3 > 0, layer % 2 == 0) for layer, n in enumerate(saes.architecture.features)]
    walk = Relevance(tower, saes, medians, leaf_error=leaf_error).walk(pixels, direction)
    images = [Saed(tower, saes, one, leaf_error=leaf_error, kept=kept if hierarchical else None) for one in pixels]
    targets = [image.logit(direction) for image in images]
    torch.testing.assert_close(walk.logits, torch.stack(targets).detach(), **CLOSE)
    for layer in range(saes.layers)[::-1]:
        assert walk.layer == layer
        found = walk.relevance()
        torch.testing.assert_close(found.total, walk.logits, **CLOSE)
        for n, (image, target) in enumerate(zip(images, targets, strict=True)):
            leaves = [image.activations[layer], image.errors[layer]]
            at_code, at_error = torch.autograd.grad(target, leaves, retain_graph=True)
            z, error = (leaf.detach() for leaf in leaves)
            if medians:
                z, error = z - medians.activations[layer], error - medians.errors[layer]
            torch.testing.assert_close(found.features[n], z * at_code, **CLOSE)
            torch.testing.assert_close(found.errors[n], (error * at_error).sum(-1), **CLOSE)
        if hierarchical and layer:
            nodes = torch.cat([kept[layer].features, torch.tensor([kept[layer].error])])
            summed = sum(walk.edges(nodes.nonzero()[:, 0].tolist()))
        walk.back(kept[layer] if hierarchical else None)
        if hierarchical and layer:
            torch.testing.assert_close(summed, walk.relevance().nodes, **CLOSE)
    assert walk.layer == -1


def test_relevance_in_any_tower(any_clip, make_saes, make_pixels):
    check(any_clip, make_saes(any_clip), make_pixels(2, any_clip.tower.image_size, seed=3), leaf_error=False)


@pytest.mark.parametrize("hierarchical", [False, True])
@pytest.mark.parametrize("leaf_error", [False, True])
def test_what_flows_back_is_a_choice(make_clip, make_saes, make_pixels, leaf_error, hierarchical):
    """Through three SAEs: the last one's error is kept, the second's is not."""
    clip = make_clip(vision_cfg={"layers": 4})
    check(clip, make_saes(clip), make_pixels(2, seed=4), leaf_error=leaf_error, hierarchical=hierarchical)


@pytest.mark.parametrize("sparsifier", ["abs_topk", "jumprelu", "batch_topk"])
def test_relevance_by_any_sparsifier(clip, make_saes, make_pixels, sparsifier):
    saes = make_saes(clip, sparsifier=sparsifier)
    check(clip, saes, make_pixels(1, seed=5), leaf_error=True, with_medians=False)


def test_all_layers_of_a_batch_each_with_its_direction(clip, make_saes, make_pixels):
    saes, pixels = make_saes(clip), make_pixels(2, seed=6)
    directions = torch.randn(2, clip.tower.embedding, generator=torch.Generator().manual_seed(1))
    relevance = Relevance(clip.tower, saes)
    together = list(relevance(pixels, directions))
    assert [of_layer.layer for of_layer in together] == [1, 0]
    for n, direction in enumerate(directions):
        for of_layer, alone in zip(together, relevance(pixels[n : n + 1], direction), strict=True):
            torch.testing.assert_close(of_layer.nodes[n], alone.nodes[0], rtol=1e-4, atol=1e-5)


def test_a_tower_of_one_layer_has_no_nodes(make_clip, make_saes, make_pixels):
    clip = make_clip(vision_cfg={"layers": 1})
    assert not list(Relevance(clip.tower, make_saes(clip))(make_pixels(1), torch.ones(clip.tower.embedding)))
