"""LibraGrad by autograd, as a reference in float64: what is held fast is detached (arXiv 2509.17401)."""

from copy import deepcopy

import torch.nn.functional as F

from vitrine.models.clip.tower import Tower


def held_norm(x, ln):
    """A LayerNorm with its denominators held fast."""
    sigma = (x.var(-1, unbiased=False, keepdim=True) + ln.eps).sqrt().detach()
    return (x - x.mean(-1, keepdim=True)) / sigma * ln.weight + ln.bias


def held_attention(block, x):
    """What a block's attention adds to the stream [T, d], with its weights and LN1's denominators held fast."""
    attn, normed = block.attn, held_norm(x, block.ln_1)
    q, k, v = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)

    def split(t):
        return t.unflatten(-1, (attn.num_heads, -1)).transpose(0, 1)

    weights = (split(q) @ split(k).transpose(-1, -2) * attn.head_dim**-0.5).softmax(-1).detach()
    mixed = (weights @ split(v)).transpose(0, 1).flatten(1)
    return block.ls_1(F.linear(mixed, attn.out_proj.weight, attn.out_proj.bias))


def held_block(block, x):
    """A block [T, d] -> [T, d] with attention weights, denominators and gates held fast."""
    x = x + held_attention(block, x)
    hidden = block.mlp.c_fc(held_norm(x, block.ln_2))
    return x + block.ls_2(block.mlp.c_proj(hidden * (block.mlp.gelu(hidden) / hidden).detach()))


def in_float64(clip):
    """A copy of a CLIP's tower."""
    return Tower(deepcopy(clip.model).double().visual)
