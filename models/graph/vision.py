"""CLIP's prediction and its account by layer in one pass, for export to ONNX: what every vision graph has.

Without a CLT this is the vision graph: the rows are the prior, each block's attention and MLP, and the bias. With one,
`models.graph.attribution` has the features' rows in the place of the MLPs'. Nothing here depends on labels. Outputs:
`models.bundle.layout.EVERY_OUTPUT`; the exported graph computes `ON_REQUEST` only on request
(`models.graph.onnx_file`). Mathematics: `models.account.ledger`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrine.models.bundle.layout import ALWAYS, given
from vitrine.models.clip.attention import Attention
from vitrine.models.clip.tower import Tower


class VisionGraph(nn.Module):
    """A tower: pixels [B, 3, H, W] -> the tensors `always`, and those of `ON_REQUEST`.

    Args:
        tower: the CLIP's vision tower.
    """

    always: tuple[str, ...] = given(ALWAYS, features=False)
    fold: Tensor
    beta: Tensor
    prior: Tensor
    bias: Tensor  # [d] the constants of a CLT

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower, self.layers = tower, tower.layers
        last = tower.layers - 1  # after the last attention only [CLS] is read
        self.attention = nn.ModuleList(Attention(block, layer == last) for layer, block in enumerate(tower.blocks))
        fold, beta = tower.fold()
        self.register_buffer("fold", fold)
        self.register_buffer("beta", beta)
        self.register_buffer("prior", tower.prior().detach())
        self.register_buffer("bias", torch.zeros(tower.width))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        tower = self.tower
        stream = before_last = tower.embed(pixels)
        mlp_ins, attn_outs, mlp_outs, residuals, weights, token_values = [], [], [], [], [], []
        for layer in range(self.layers):
            last = layer == self.layers - 1
            if last:
                before_last = stream
            attention = self.attention[layer](stream)
            stream = (stream[:, :1] if last else stream) + attention.out
            mlp_in, mlp_out = tower.mlp(layer, stream)
            stream = stream + mlp_out
            mlp_ins.append(mlp_in[:, :1])
            attn_outs.append(attention.out[:, 0])
            mlp_outs.append(mlp_out[:, 0])
            residuals.append(stream[:, 0])
            weights.append(attention.weights[:, :, 0])
            token_values.append(attention.values)

        account = self.explain(stream[:, 0], torch.stack(attn_outs, dim=1), torch.stack(mlp_outs, dim=1), mlp_ins)
        parts: Any = self.attention
        heads = [part.by_head(*of) for part, *of in zip(parts, weights, token_values, strict=True)]
        return (
            *account,
            F.normalize(tower.head(torch.stack(residuals, dim=1)), dim=-1),
            torch.stack(weights, dim=1),
            torch.stack(token_values, dim=1),
            before_last.norm(dim=-1),
            torch.stack(heads, dim=1),
        )

    def explain(
        self, residual: Tensor, attention: Tensor, mlp: Tensor, mlp_in: Sequence[Tensor], *edit: Tensor
    ) -> tuple[Tensor, ...]:
        """`always` of [CLS] residuals [B, d] that are the sum of the prior and of what attention and the MLPs wrote
        [B, L, d] each. mlp_in: what the MLPs read, L times [B, 1, d]. edit [B, d]: what was added besides, if anything.
        """
        del mlp_in  # a CLT's features read it
        components = self.components(attention, mlp, torch.zeros_like(residual), *edit)
        return (*self.rows(residual, components, components @ self.fold), components)

    def components(self, attention: Tensor, written: Tensor, *others: Tensor) -> Tensor:
        """[B, R, d] in the order of `models.account.ledger`: of what attention and the features (or the MLPs) write
        [B, L, d], and what comes after the biases [B, d] each."""
        prior, bias = (part.expand(written.shape[0], 1, -1) for part in (self.prior, self.bias))
        return torch.cat([prior, attention, written, bias, *(other[:, None] for other in others)], dim=1)

    def rows(
        self, residual: Tensor, components: Tensor, folded: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(unit embeddings [B, D], their rows [B, R, D], sigma [B], sigma without each component [B, R], |z| [B]) of
        residuals [B, d] that are the sum of components [B, R, d]; folded [B, R, D]: those by M (`Tower.fold`)."""
        z = self.tower.head(residual)
        norm = z.norm(dim=-1)
        sigma = self._sigma(residual)
        rows = folded / sigma[:, None, None]
        bias = 2 * self.layers + 1
        rows = torch.cat([rows[:, :bias], rows[:, bias : bias + 1] + self.beta, rows[:, bias + 1 :]], dim=1)
        without = self._sigma(residual[:, None] - components)
        return z / norm[:, None], rows / norm[:, None, None], sigma, without, norm

    def _sigma(self, residual: Tensor) -> Tensor:
        """Standard deviation of residuals [..., d] as in ln_post."""
        return denominator(residual, self.tower.visual.ln_post)


def denominator(stream: Tensor, ln: nn.LayerNorm) -> Tensor:
    """Standard deviation [...] of a stream [..., d] as in a LayerNorm."""
    return (stream.var(dim=-1, unbiased=False) + ln.eps).sqrt()
