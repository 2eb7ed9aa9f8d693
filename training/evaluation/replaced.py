"""The [CLS] residual of the replacement model (`models.dictionary.replacement`) in many windows of the same images.

The same model, with what the windows share computed once:

- up to its first layer's MLP, a window reads CLIP's own stream: attention, code and CLT output are known there,
- so is what the layers up to the first write into the later layers of the window,
- behind the last attention only [CLS] is followed, the one token that reaches the prediction.

L layers, B images, T tokens, N = B * T, t replaced tokens per image, d width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitrine.models.account.windows import Tokens
from vitrine.models.clip.tower import Taps, Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.replacement import of_type, which_are_cls, with_mlp
from vitrine.models.dictionary.sparse_products import SortedCode


@dataclass
class Known:
    """What CLIP and the CLT make of some images, with nothing replaced."""

    taps: Taps
    codes: list[SortedCode]  # [L], each [N, K]
    decoded: list[Tensor] = field(default_factory=list)  # [L], each [B, T, d]
    # By (last source layer s, target layer j > s): what the source layers up to s write to j, [B, T, d].
    written: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def add(self, target: int, bias: Tensor, sources: range, parts: Tensor, starts: set[int]) -> None:
        """What is written to a target [S, N, d]; starts: the first layers of windows."""
        shape = self.taps.residual_out.shape
        total = torch.zeros_like(parts[0])
        for source, part in zip(sources, parts, strict=True):
            total = total + part
            if source in starts and source < target:
                self.written[source, target] = total.view(shape)
        self.decoded.append((total + bias).view(shape))


class Replaced:
    """A tower and the CLT that replaces its MLPs. Without gradients."""

    def __init__(self, tower: Tower, clt: CrossLayerTranscoder) -> None:
        self.tower, self.clt = tower, clt

    @torch.no_grad()
    def __call__(self, known: Known, window: range, tokens: Tokens) -> Tensor:
        """[CLS] before ln_post [B, d], with the MLPs of `window` replaced for the chosen tokens.

        `known` must know the window's first layer as one of the `starts`.
        """
        taps, first, last = known.taps, window[0], self.tower.layers - 1
        stream = taps.residual_in + taps.attn_out[: first + 1].sum(0) + taps.mlp_out[:first].sum(0)
        stream = stream + _mixed(known.decoded[first], taps.mlp_out[first], tokens)
        codes: dict[int, SortedCode] = {}  # of the replaced tokens, from the second layer of the window on
        for layer in range(first + 1, last + 1):
            at_end = layer == last
            stream = (stream[:, :1] if at_end else stream) + self.tower.attention(layer, stream, cls_only=at_end)
            mlp_in = self.tower.mlp_input(layer, stream)
            if layer > window[-1] or (at_end and tokens == "patches"):
                stream = stream + self.tower.mlp_output(layer, mlp_in)
                continue
            is_cls = which_are_cls(stream, tokens)
            codes[layer] = self.clt.encoders[layer](of_type(mlp_in, tokens).flatten(0, 1), is_cls)
            decoded = self._decode(known, first, layer, codes, tokens, at_end)
            stream = stream + with_mlp(self.tower, layer, mlp_in, decoded, "all" if at_end else tokens)
        return stream[:, 0]

    def _decode(
        self, known: Known, first: int, layer: int, codes: dict[int, SortedCode], tokens: Tokens, at_end: bool
    ) -> Tensor:
        """What the CLT writes to the replaced tokens of a layer, [B, t, d]; of [CLS] alone `at_end`."""
        decoder, images = self.clt.decoders[layer], len(known.taps.residual_in)
        decoded = decoder.bias
        if (first, layer) in known.written:  # not for a CLT whose features write to their own layer alone
            decoded = decoded + of_type(known.written[first, layer], "cls" if at_end else tokens)
        for source, code in codes.items():
            if source in decoder.sources:
                if at_end:
                    code = _first_tokens(code, images)
                decoded = decoded + decoder.contribution(source, code).unflatten(0, (images, -1))
        return decoded


def _mixed(decoded: Tensor, mlp_out: Tensor, tokens: Tokens) -> Tensor:
    """The CLT's output for the replaced tokens, the MLP's for the others, both given for all: [B, T, d]."""
    if tokens == "all":
        return decoded
    cls, patches = (decoded, mlp_out) if tokens == "cls" else (mlp_out, decoded)
    return torch.cat([cls[:, :1], patches[:, 1:]], dim=1)


def _first_tokens(code: SortedCode, images: int) -> SortedCode:
    """The code of each image's first token."""
    indices, values = (part.unflatten(0, (images, -1))[:, 0] for part in (code.indices, code.values))
    return code._replace(indices=indices, values=values, order=None)
