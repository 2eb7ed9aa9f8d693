"""An open_clip vision tower whose internal activations can be read.

The vision tower is a residual stream: `ln_pre(embeddings)`, to which every block adds its attention output and its
MLP output. `Tower` runs open_clip's own modules in open_clip's order and returns those parts (*taps*), whose sum is
exactly the final residual:

    residual_out = residual_in + sum_l (attn_out[l] + mlp_out[l])        (LayerScale, where present, included)

L blocks (layers), B images, T tokens ([CLS] first, then patches row by row), d width, D embedding size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from vitrine.models.clip.attention import constant
from vitrine.models.errors import VitrineError


class UnsupportedTower(VitrineError, ValueError):
    """Vitrine cannot account for the residual stream of this vision tower; the message says why."""


class Taps(NamedTuple):
    """The internal activations of one forward pass."""

    residual_in: Tensor  # [B, T, d] what enters block 0 (after ln_pre)
    mlp_in: Tensor  # [L, B, T, d] ln_2 outputs: the input of the MLPs and of the CLT's encoders
    attn_out: Tensor  # [L, B, T, d] what attention adds to the stream
    mlp_out: Tensor  # [L, B, T, d] what the MLPs add to the stream: the CLT's targets
    residual_out: Tensor  # [B, T, d] what enters ln_post


class Tower(nn.Module):
    """The vision tower of a CLIP, with taps.

    Accepts open_clip's `VisionTransformer` that pools the class token: any size, GELU or QuickGELU, with or
    without `ln_pre` and LayerScale. Raises `UnsupportedTower` for every other tower.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual: Any
        self.blocks: Any
        _check_supported(visual)
        self.visual = visual
        self.blocks = self.visual.transformer.resblocks
        self.layers = len(self.blocks)
        self.width, self.embedding = (int(size) for size in self.visual.proj.shape)
        self.image_size: tuple[int, int] = tuple(self.visual.image_size)
        self.tokens = int(self.visual.positional_embedding.shape[0])

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] to the residual stream before block 0 [B, T, d]."""
        return self.visual._embeds(pixels)

    def attention(self, layer: int, stream: Tensor, cls_only: bool = False) -> Tensor:
        """What block `layer`'s attention adds to the stream [B, T, d]; [B, 1, d] with `cls_only`."""
        block = self.blocks[layer]
        normed = block.ln_1(stream)
        queries = normed[:, :1] if cls_only else normed
        return block.ls_1(block.attention(queries, k_x=normed, v_x=normed))

    def mlp(self, layer: int, stream: Tensor) -> tuple[Tensor, Tensor]:
        """(ln_2 output, what the MLP adds to the stream) of block `layer`, both shaped like `stream`."""
        mlp_in = self.mlp_input(layer, stream)
        return mlp_in, self.mlp_output(layer, mlp_in)

    def mlp_input(self, layer: int, stream: Tensor) -> Tensor:
        """What block `layer`'s MLP reads: the ln_2 output, shaped like `stream`."""
        return self.blocks[layer].ln_2(stream)

    def mlp_output(self, layer: int, mlp_in: Tensor) -> Tensor:
        """What block `layer`'s MLP adds to the stream, for ln_2 outputs of any tokens, LayerScale included."""
        block = self.blocks[layer]
        return block.ls_2(block.mlp(mlp_in))

    def neurons(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """(W [H, d], b [H], V [H, d]): the H hidden neurons of block `layer`'s MLP, which adds act(W x + b) V and a
        bias to the stream, for ln_2 outputs x; LayerScale included."""
        block = self.blocks[layer]
        writes = block.ls_2(block.mlp.c_proj.weight.detach().T)
        return block.mlp.c_fc.weight.detach(), block.mlp.c_fc.bias.detach(), writes

    def head(self, residual: Tensor) -> Tensor:
        """[CLS] residual [..., d] to the CLIP embedding [..., D], not normalised."""
        return self.visual.ln_post(residual) @ self.visual.proj

    def forward(self, pixels: Tensor) -> Taps:
        """All taps of all tokens, for normalised pixels [B, 3, H, W]."""
        stream = residual_in = self.embed(pixels)
        mlp_ins, attn_outs, mlp_outs = [], [], []
        for layer in range(self.layers):
            attn_out = self.attention(layer, stream)
            stream = stream + attn_out
            mlp_in, mlp_out = self.mlp(layer, stream)
            stream = stream + mlp_out
            mlp_ins.append(mlp_in)
            attn_outs.append(attn_out)
            mlp_outs.append(mlp_out)
        return Taps(residual_in, torch.stack(mlp_ins), torch.stack(attn_outs), torch.stack(mlp_outs), stream)

    def prior(self) -> Tensor:
        """[CLS] before block 0 [d]: class token and its position through ln_pre, the same for every image."""
        visual = self.visual
        return visual.ln_pre(visual.class_embedding + visual.positional_embedding[0])

    def fold(self) -> tuple[Tensor, Tensor]:
        """ln_post and the projection as an affine map, up to one number per image.

        Returns (M [d, D], beta [D]) such that `head(r) = r @ M / sigma(r) + beta`, where `sigma(r)` is the standard
        deviation that ln_post computes for that residual. M centres its argument, so a component that is constant
        over channels contributes nothing. Computed in float64, so that folding costs no precision.
        """
        matrix, beta = self._fold64()
        return matrix.float(), beta.float()

    def attention_fold(self) -> Tensor:
        """[L, d + 1, D]: what one unit of each value channel (`models.clip.attention`) adds to the embedding, in the
        units of `fold`. The last row: what each block's attention adds to every token, the biases of values and output.
        """
        matrix, _ = self._fold64()
        tables = []
        for block in self.blocks:
            weight = block.attn.out_proj.weight.detach().double()
            tables.append(block.ls_1(torch.cat([weight.T, constant(block.attn)[None]])) @ matrix)
        return torch.stack(tables).float()

    def _fold64(self) -> tuple[Tensor, Tensor]:
        ln, proj = self.visual.ln_post, self.visual.proj.detach().double()
        scaled = ln.weight.detach().double()[:, None] * proj
        return scaled - scaled.mean(dim=0), ln.bias.detach().double() @ proj


def _check_supported(visual: nn.Module) -> None:
    """Raise `UnsupportedTower` if `visual` has a part without an exact account; the message names it."""
    if not isinstance(visual, VisionTransformer):
        raise UnsupportedTower(
            f"vision tower {type(visual).__module__}.{type(visual).__name__} is not supported: "
            "Vitrine needs open_clip's VisionTransformer (ViT-B-32, ViT-B-16, ViT-L-14, ...)"
        )
    block_types = {type(block).__name__ for block in visual.transformer.resblocks}
    custom_blocks = sorted(block_types - {ResidualAttentionBlock.__name__})
    reasons = {
        "attentional pooling (attn_pool)": visual.attn_pool is not None,
        f"pool_type '{visual.pool_type}' (only 'tok', the class token)": visual.pool_type != "tok",
        f"blocks of type {', '.join(custom_blocks)}": bool(custom_blocks),
        "a tower without projection": visual.proj is None,
        "output_tokens": visual.output_tokens,
    }
    if unsupported := [reason for reason, present in reasons.items() if present]:
        raise UnsupportedTower(f"VisionTransformer with {'; '.join(unsupported)} is not supported")
