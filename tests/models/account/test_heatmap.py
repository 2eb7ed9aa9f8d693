"""Heat maps and the lens against the formulas, head by head and patch by patch, in float64."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from vitrine.models.account.heatmap import heat_map, outliers
from vitrine.models.account.ledger import Decomposition, Details, ledger
from vitrine.models.bundle.layout import EVERY_OUTPUT, ON_REQUEST
from vitrine.models.clip.tower import Tower
from vitrine.models.graph.attribution import AttributionGraph


@pytest.fixture(scope="module")
def tower(any_clip):
    return Tower(deepcopy(any_clip.model).double().visual)


@pytest.fixture(scope="module")
def pixels(any_clip, make_pixels):
    return make_pixels(2, any_clip.tower.image_size, seed=3)


@pytest.fixture(scope="module")
def parts(any_clip, make_clt, pixels):
    """The graph's decomposition of each image, including details."""
    graph = AttributionGraph(any_clip.tower, make_clt(any_clip), torch.zeros(3, 32), torch.float32)
    outputs = dict(zip(EVERY_OUTPUT, (output.numpy() for output in graph(pixels)), strict=True))
    details, fidelity = {name: outputs.pop(name) for name in ON_REQUEST}, outputs.pop("fidelity")
    return [
        Decomposition(
            **{name: value[image] for name, value in outputs.items()},
            r2=fidelity[image, 0],
            cosine=fidelity[image, 1],
            details=Details(**{name: value[image] for name, value in details.items()}),
        )
        for image in range(len(pixels))
    ]


@pytest.fixture(scope="module")
def reference(tower, any_clip, pixels):
    """(split [B, L, H, T], constant [B, L]) of the first label's attention rows, by the ledger's formulas."""
    label = any_clip.encode_labels(["a cat"], ["{}"])[0].double()
    visual, taps = tower.visual, tower(pixels.double())
    residual = taps.residual_out[:, 0]
    sigma = (residual.var(-1, correction=0) + visual.ln_post.eps).sqrt()
    norm = tower.head(residual).norm(dim=-1)

    def logits(component):
        """[B, ..., d] -> [B, ...]"""
        centred = visual.ln_post.weight * (component - component.mean(-1, keepdim=True))
        scale = any_clip.logit_scale / (sigma * norm)
        return scale.view(-1, *[1] * (component.ndim - 2)) * (centred @ visual.proj @ label)

    split, constant = [], []
    stream = taps.residual_in
    for layer, block in enumerate(tower.blocks):
        attn, normed = block.attn, block.ln_1(stream)
        _, weights = attn(normed, normed, normed, need_weights=True, average_attn_weights=False)
        heads = []
        for head in range(attn.num_heads):
            dims = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
            value = normed @ attn.in_proj_weight.chunk(3)[2][dims].T
            written = weights[:, head, 0, :, None] * (value @ attn.out_proj.weight[:, dims].T)  # [B, T, d]
            heads.append(logits(block.ls_1(written)))
        split.append(torch.stack(heads, 1))
        bias = attn.out_proj.weight @ attn.in_proj_bias.chunk(3)[2] + attn.out_proj.bias
        constant.append(logits(block.ls_1(bias).expand(len(pixels), -1)))
        stream = stream + taps.attn_out[layer] + taps.mlp_out[layer]
    return torch.stack(split, 1).numpy(), torch.stack(constant, 1).numpy(), label.numpy()


def test_every_part_is_that_of_the_formulas(any_clip, parts, reference):
    splits, constants, label = reference
    fold = any_clip.tower.attention_fold().numpy()
    for part, split, constant in zip(parts, splits, constants, strict=True):
        heatmap = heat_map(part, part.details, fold, label, any_clip.logit_scale)
        for name, expected in {
            "patches": split[:, :, 1:].sum(1),
            "heads": split[:, :, 1:].sum(2),
            "class_token": split[:, :, 0].sum(1),
            "constant": constant,
        }.items():
            np.testing.assert_allclose(getattr(heatmap, name), expected, rtol=0, atol=1e-4, err_msg=name)


def test_parts_add_up_to_the_attention_rows_of_the_ledger(any_clip, parts):
    a, b = any_clip.encode_labels(["a cat", "the sea"], ["{}"]).numpy()
    fold = any_clip.tower.attention_fold().numpy()
    for part in parts:
        for direction in (a, a - b):
            heatmap = heat_map(part, part.details, fold, direction, any_clip.logit_scale)
            total = heatmap.patches.sum(1) + heatmap.class_token + heatmap.constant
            rows = ledger(part, direction, any_clip.logit_scale).attention
            np.testing.assert_allclose(total, rows, rtol=0, atol=1e-4)


def test_lens_is_the_tower_cut_off_after_each_layer(any_clip, parts, pixels):
    for layer in range(any_clip.tower.layers):
        model = deepcopy(any_clip.model)
        model.visual.transformer.resblocks = model.visual.transformer.resblocks[: layer + 1]
        for part, expected in zip(parts, model.encode_image(pixels, normalize=True).numpy(), strict=True):
            np.testing.assert_allclose(part.details.lens[layer], expected, rtol=0, atol=1e-5)


def test_norms_are_of_what_enters_the_last_block(any_clip, parts, pixels):
    taps = any_clip.tower(pixels)
    entering = taps.residual_in + taps.attn_out[:-1].sum(0) + taps.mlp_out[:-1].sum(0)
    for part, expected in zip(parts, entering.norm(dim=-1).numpy(), strict=True):
        np.testing.assert_allclose(part.details.token_norms, expected, rtol=1e-5)


def test_outliers_are_longer_than_twice_the_median():
    assert outliers(np.array([1.0, 1.1, 0.9, 2.3, 1.0, 9.0])).tolist() == [False, False, False, True, False, True]
    assert not outliers(np.ones(9)).any()
