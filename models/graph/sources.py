"""The backward half of the source account, for export to ONNX: directions followed back to what was written.

One pass follows any number n of directions through one image's trace (`models.graph.trace`), through attention alone:
no MLP runs backward, since what an MLP writes is where an account ends. With G [n, T, d] the gradient at the stream,
going down from block l:

    from what the MLP of block l wrote, w at token p    <w, G[p]>
    before attention l                                   G + LN1' sum_h A_h' (G W_O^h W_V^h)

(' transposed; LN1 with its denominators held fast). A direction starts after the last block, at [CLS], for a logit; at
the input of one layer's encoder, at any token, for a feature's pre-activation; or at the output of one layer's LN1, for
what its attention reads (`models.graph.scores`).

With a CLT what the MLP of target j wrote is split: z <W^{i->j}[f], G[p]> for every active feature of every source layer
i <= j, the decoder bias, and the error, which is what is left. So all numbers add up whatever the decoders' precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitrine.models.clip.attention import constant
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.graph.back import through_attention, through_attention_of_one, through_norm
from vitrine.models.graph.replacement import Int8Decoder


class SourcesGraph(nn.Module):
    """n directions and one image's trace -> contributions of embeddings [n, T], errors [n, L, T], constants [n]; with a
    CLT of features [n, L, T, k] and decoder biases [n, L], and the gradients by token type [n, L, 2, d] from which the
    average picture's account is computed.

    Inputs, n directions:
        direction: [n, d] of the residual after the last block, for those that start there; of the output of LN1, for
            those that start there.
        layer: [n] where each starts: L after the last block, l < L in layer l.
        token: [n] the token t at which it starts; after the last block [CLS], which alone is read there; t + T, at LN1
            only: at t, less the mean over all tokens.
        feature: [n] for l < L: whose encoder row is the direction; -1: none, it starts at LN1. Without a CLT, unused.
        weights [L, H, T, T], before_attention, before_mlp [L, T], embedded [T, d], written [L, T, d], and with a CLT
        indices, values [L, T, k]: the trace.
    """

    attention_constants: Tensor  # [L, d] what attention adds to every token
    read_gains: Tensor  # [L, d] of ln_1
    read_constants: Tensor  # [L, d] ln_1's beta
    encoder_rows: Tensor  # [L * F, d], in `tables`
    gains: Tensor  # [L, d] of ln_2
    encoder_constants: Tensor  # [L * F] of a pre-activation, whatever is written
    decoder_biases: Tensor  # [L, d] of the decoders

    def __init__(self, tower: Tower, clt: CrossLayerTranscoder | None, tables: torch.dtype) -> None:
        super().__init__()
        self.tower, self.layers, self.tokens, self.width = tower, tower.layers, tower.tokens, tower.width
        self.has_code = clt is not None
        # What LN1 adds to every token passes through attention as biases do.
        blocks = ((block, constant(block.attn, block.ln_1.bias)) for block in tower.blocks)
        self.register_buffer("attention_constants", torch.stack([block.ls_1(added.float()) for block, added in blocks]))
        self.register_buffer("read_gains", torch.stack([block.ln_1.weight.detach() for block in tower.blocks]))
        self.register_buffer("read_constants", torch.stack([block.ln_1.bias.detach() for block in tower.blocks]))
        if clt is not None:
            self.features = clt.features
            encoders = clt.encoders
            self.register_buffer("encoder_rows", torch.cat([e.weight.detach() for e in encoders]).to(tables))
            self.register_buffer("gains", torch.stack([block.ln_2.weight.detach() for block in tower.blocks]))
            own = [e.bias + e.weight @ block.ln_2.bias for e, block in zip(encoders, tower.blocks, strict=True)]
            self.register_buffer("encoder_constants", torch.cat(own).detach())  # [L * F]
            self.sources = [clt.architecture.sources(target) for target in range(clt.layers)]
            self.decoders = nn.ModuleList(nn.ModuleList(map(Int8Decoder, d.weights)) for d in clt.decoders)
            self.register_buffer("decoder_biases", clt.decoder_biases())

    def forward(
        self,
        direction: Tensor,
        layer: Tensor,
        token: Tensor,
        feature: Tensor,
        weights: Tensor,
        before_attention: Tensor,
        before_mlp: Tensor,
        embedded: Tensor,
        written: Tensor,
        indices: Tensor | None = None,
        values: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        last = layer == self.layers
        clamped = layer.clamp_max(self.layers - 1)
        rows = direction * self.read_gains.index_select(0, clamped)
        scales = before_attention.index_select(0, clamped)  # [n, T]
        own = (direction * self.read_constants.index_select(0, clamped)).sum(-1) * (token < self.tokens)
        at_encoder = torch.zeros_like(last)
        if self.has_code:
            at_encoder = (feature >= 0) & ~last
            place = clamped * self.features + feature.clamp_min(0)
            encoder = self.encoder_rows.index_select(0, place).float() * self.gains.index_select(0, clamped)
            rows = torch.where(at_encoder[:, None], encoder, rows)
            scales = torch.where(at_encoder[:, None], before_mlp.index_select(0, clamped), scales)
            own = torch.where(at_encoder, self.encoder_constants.index_select(0, place), own)
        at_reading = ~(last | at_encoder)
        less_mean = token >= self.tokens
        token = torch.where(last, 0, token % self.tokens)
        at = torch.arange(self.tokens) == token[:, None]  # [n, T]
        rows = rows - rows.mean(-1, keepdim=True)
        direction = torch.where(last[:, None], direction, rows / scales.gather(1, token[:, None]))
        reading = (at.float() - less_mean[:, None] / self.tokens) / scales  # [n, T]
        own = torch.where(last, 0.0, own)

        gradient = (direction * last[:, None])[:, None]  # [n, 1, d] after the last block only [CLS] is read
        parts: Any = [0.0] * self.layers
        errors, biases, gradients, constants = [], [], [], [own]
        for target in reversed(range(self.layers)):
            block: Any = self.tower.blocks[target]
            read = gradient.shape[1]  # tokens
            total = gradient.sum(1)  # [n, d]
            left = written[target, :read]  # [T, d]
            if indices is not None and values is not None:
                bias = self.decoder_biases[target]
                biases.append(total @ bias)
                gradients.append(torch.stack([gradient[:, 0], total - gradient[:, 0]], dim=1))
                by_token = gradient.flatten(1).t().unflatten(0, (read, self.width))  # [T, d, n], see `products`
                features: Any = 0.0  # [T, n]
                tables: Any = self.decoders[target]
                for source, table in zip(self.sources[target], tables, strict=True):
                    part = table.products(indices[source, :read], values[source, :read], by_token)  # [T, k, n]
                    features = features + part.sum(1)
                    parts[source] = parts[source] + self._of_all_tokens(part)
                errors.append((((left - bias) * gradient).sum(-1) - features.t()).t())
            else:
                errors.append((left * gradient).sum(-1).t())
            here = layer == target
            start = direction * (here & at_encoder)[:, None]
            constants.append((total + start) @ self.attention_constants[target])
            if target == self.layers - 1:  # every direction still has one token
                one = total + start
                gradient = at[:, :, None] * one[:, None]
                normed = through_attention_of_one(block, one, weights[target].index_select(1, token))
            else:
                gradient = gradient + at[:, :, None] * start[:, None]
                normed = through_attention(block, gradient, weights[target])
            gradient = gradient + through_norm(block.ln_1, normed, before_attention[target])
            gradient = gradient + reading[:, :, None] * (rows * (here & at_reading)[:, None])[:, None]
        results = [
            (embedded * gradient).sum(-1),  # [n, T]
            torch.stack([self._of_all_tokens(part) for part in errors[::-1]]).permute(2, 0, 1),  # [n, L, T]
            torch.stack(constants, dim=1).sum(-1),  # [n]
        ]
        if self.has_code:
            of_layers = (torch.stack(part[::-1], dim=1) for part in (biases, gradients))
            results += [torch.stack(parts).permute(3, 0, 1, 2), *of_layers]  # [n, L, T, k], [n, L], [n, L, 2, d]
        return tuple(results)

    def _of_all_tokens(self, part: Tensor) -> Tensor:
        """[T, ...] of all tokens, or of [CLS] alone -> [T, ...], 0 at the others."""
        if len(part) == self.tokens:
            return part
        return torch.cat([part, torch.zeros(self.tokens - 1, *part.shape[1:])])


@torch.no_grad()
def written_by(clt: CrossLayerTranscoder, code: Tensor) -> Tensor:
    """What codes of every layer [L, 2, F], one by token type, write: [L, L, 2, d] by target and source layer, 0 where a
    source does not write. By the decoders as the graph has them."""
    written = torch.zeros(clt.layers, clt.layers, *code.shape[1:-1], clt.width)
    for target, decoder in enumerate(clt.decoders):
        for source, weight in zip(decoder.sources, decoder.weights, strict=True):
            table = Int8Decoder(weight)
            written[target, source] = (code[source] * table.scales) @ table.rows.float()
    return written
