"""The residual replacement model: the tower whose stream passes through SAEs after some of its blocks
(arXiv 2509.17401).

    stream  = block l of the stream
    stream  = SAE l's version of it          where l is in the window and the token is replaced
            (+ what the SAE leaves, held fast: with `keep_error`)

So the replacement is cascaded: later blocks, and later SAEs, read what the SAEs before them made. With errors kept the
values are the tower's own, and only gradients differ: they pass through features alone.

L blocks, B images, T tokens, t replaced tokens per image, d width, K places of a code.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from vitrine.models.account.windows import Tokens
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.replacement import of_type, which_are_cls
from vitrine.models.dictionary.residual_sae import ResidualSaes
from vitrine.models.dictionary.sparse_products import SortedCode


class ResidualReplacementOutput(NamedTuple):
    """One pass through the residual replacement model."""

    residual: Tensor  # [B, T, d] what enters ln_post
    codes: list[SortedCode | None]  # [L - 1], each [B * t, K] over the replaced tokens; None outside the window


class ResidualReplacement(nn.Module):
    """A tower and its residual SAEs. Differentiable: gradients reach the SAEs through the tower."""

    def __init__(self, tower: Tower, saes: ResidualSaes) -> None:
        super().__init__()
        if (saes.layers, saes.width) != (tower.layers - 1, tower.width):
            raise ValueError(
                f"there are {saes.layers} SAEs of width {saes.width}, but the tower has {tower.layers} blocks of "
                f"width {tower.width}, and the last block has no SAE"
            )
        self.tower, self.saes = tower, saes

    def forward(
        self, pixels: Tensor, window: range, tokens: Tokens = "all", keep_error: bool = False
    ) -> ResidualReplacementOutput:
        """Run normalised pixels [B, 3, H, W] with the stream after the blocks `window` replaced for the chosen tokens.

        An empty window gives the tower's own result, bit for bit.

        Raises `ValueError` for SAEs that do not exist.
        """
        saes = range(self.saes.layers)
        if window and (window.step != 1 or window[0] not in saes or window[-1] not in saes):
            raise ValueError(f"{window} is not a window of {self.saes.layers} SAEs")
        stream = self.tower.embed(pixels)
        codes: list[SortedCode | None] = []
        for layer in range(self.tower.layers):
            stream = self.block(layer, stream)
            if layer in saes:
                code, stream = self.replace(layer, stream, tokens, keep_error) if layer in window else (None, stream)
                codes.append(code)
        return ResidualReplacementOutput(stream, codes)

    def block(self, layer: int, stream: Tensor, cls_only: bool = False) -> Tensor:
        """The stream after a block [B, T, d]; of [CLS] alone [B, 1, d] with `cls_only`."""
        after = (stream[:, :1] if cls_only else stream) + self.tower.attention(layer, stream, cls_only)
        return after + self.tower.mlp(layer, after)[1]

    def replace(
        self, layer: int, stream: Tensor, tokens: Tokens, keep_error: bool = False
    ) -> tuple[SortedCode, Tensor]:
        """(code of the chosen tokens [B * t, K], the stream after a block with the SAE's version of them)."""
        chosen = of_type(stream, tokens)
        code, version = self.saes.reconstruct(layer, chosen.flatten(0, 1), which_are_cls(stream, tokens))
        version = version.view_as(chosen)
        if keep_error:
            version = version + (chosen - version).detach()
        return code, mixed(version, stream, tokens)


def mixed(replaced: Tensor, own: Tensor, tokens: Tokens) -> Tensor:
    """The chosen tokens [B, t, d], or of all [B, T, d] the chosen ones, and the tower's own others: [B, T, d]."""
    if tokens == "all":
        return replaced
    out = own.clone()
    of_type(out, tokens).copy_(replaced if replaced.shape != own.shape else of_type(replaced, tokens))
    return out
