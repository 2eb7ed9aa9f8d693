"""Interventions in the running network, for export to ONNX: what later layers make of them included.

The network itself runs, its MLPs too; only differences are added, so that where nothing is changed this is the vision
graph (`models.graph.attribution`), and what the CLT does not explain stays as it is. What changes is an input, a
`models.interventions.changes.Changes`, so that one graph serves every intervention:

    direction  x <- x + sum over m of (gain <x, u> + offset) u          before a block, or after the last
    head       W_O^h (sum over tokens of weight v + b_v) times a factor
    attention  what the block's attention adds, times a factor
    feature    d = gain z + offset      z the activation in this network, with everything below changed
    MLP        what it adds, times a factor; and to that sum over features of layers i <= j of d W^{i->j}

The account of [CLS] is that of the vision graph, with these differences:

    code    without the changed features at their places, and with them and z' = z + d at n further ones
    clt     what the changed code writes
    error   MLP outputs, times their factors, less what the unchanged code and the decoders' biases write
    edit    a further row, the last: what changes of directions write to [CLS]; and, since d W^{i->j} has the decoders
            in 8 bits (`models.graph.replacement`), by how much that differs from the change of the clt rows

so that the rows add up to the embedding exactly.

B images, L layers, T tokens, H heads, F features, d width; n features, m directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.graph.attribution import AttributionGraph, served_encoders
from vitrine.models.graph.replacement import Int8Decoder, TokenCode
from vitrine.models.graph.vision import VisionGraph


class Changed(NamedTuple):
    """`models.bundle.layout.RERUN_INPUTS`."""

    layers: Tensor  # [n] int64
    indices: Tensor  # [n] int64
    gains: Tensor  # [B, n, T]
    offsets: Tensor  # [B, n, T]
    places: Tensor  # [m] int64
    directions: Tensor  # [m, d]
    direction_gains: Tensor  # [B, m, T]
    direction_offsets: Tensor  # [B, m, T]
    heads: Tensor  # [B, L, H, T]
    attention: Tensor  # [B, L, T]
    mlp: Tensor  # [B, L, T]

    def of_layer(self, layer: int) -> Tensor:
        """Which features are of a layer [n], as 0 or 1."""
        return (self.layers == layer).to(self.gains.dtype)

    def difference(self, z: Tensor, layer: int) -> Tensor:
        """d [B, t, n] of the features of a layer, by their activations [B, t, n], 0 for the others; for the first t
        tokens."""
        tokens = z.shape[1]
        gains, offsets = (part[:, :, :tokens].transpose(1, 2) for part in (self.gains, self.offsets))
        return (gains * z + offsets) * self.of_layer(layer)

    def along_directions(self, stream: Tensor, place: int) -> Tensor:
        """What the directions before block `place` add to the stream [B, t, d] of the first t tokens."""
        tokens = stream.shape[1]
        gains, offsets = (
            part[:, :, :tokens].transpose(1, 2) for part in (self.direction_gains, self.direction_offsets)
        )
        lengths = gains * (stream @ self.directions.t()) + offsets
        return (lengths * (self.places == place).to(lengths.dtype)) @ self.directions


def dense(code: tuple[Tensor, Tensor], features: int) -> Tensor:
    """A code, (features, activations) [B, t, k] each, as activations of all features [B, t, F]."""
    indices, values = code
    nothing = values.new_zeros(*values.shape[:-1], features)
    return nothing.scatter(-1, indices, values)


def run_changed(
    vision: VisionGraph, pixels: Tensor, changed: Changed, after: Callable[[int, Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Run the tower, changed. after: (layer, ln_2 output, stream after the block) [B, t, d] -> what features add to it.

    Returns of [CLS] the residual [B, d], what attention and the MLPs wrote to it [B, L, d] each, and all that was added
    besides [B, d]; and its ln_2 outputs, L of [B, 1, d].
    """
    tower, last = vision.tower, vision.layers - 1
    stream = tower.embed(pixels)
    mlp_ins, attn_outs, mlp_outs, added = [], [], [], []
    for layer in range(vision.layers):
        edit = changed.along_directions(stream, layer)
        stream = stream + edit
        count = 1 if layer == last else stream.shape[1]  # after the last attention only [CLS] is read
        heads, attention, mlp = (
            part[:, layer, ..., :count] for part in (changed.heads, changed.attention, changed.mlp)
        )
        attn_out = vision.attention[layer](stream, heads).out * attention[..., None]
        stream = stream[:, :count] + attn_out
        mlp_in, mlp_out = tower.mlp(layer, stream)
        mlp_out = mlp_out * mlp[..., None]
        stream = stream + mlp_out
        of_features = after(layer, mlp_in, stream)
        stream = stream + of_features
        mlp_ins.append(mlp_in[:, :1])
        attn_outs.append(attn_out[:, 0])
        mlp_outs.append(mlp_out[:, 0])
        added += [edit[:, 0], of_features[:, 0]]
    edit = changed.along_directions(stream, vision.layers)
    added.append(edit[:, 0])
    parts = torch.stack(attn_outs, dim=1), torch.stack(mlp_outs, dim=1), torch.stack(added).sum(0)
    return (stream + edit)[:, 0], *parts, mlp_ins


class ChangedGraph(nn.Module):
    """(pixels [B, 3, H, W], the parts of `Changed`) -> the tensors `vision.always`, with the row of edits. Subclasses
    say whose features are changed; without a CLT there are none."""

    types: Tensor  # [T] 0: [CLS], 1: patches

    def __init__(self, vision: VisionGraph) -> None:
        super().__init__()
        self.vision = vision
        self.register_buffer("types", torch.arange(vision.tower.tokens).clamp_max(1))

    def forward(
        self,
        pixels: Tensor,
        layers: Tensor,
        indices: Tensor,
        gains: Tensor,
        offsets: Tensor,
        places: Tensor,
        directions: Tensor,
        direction_gains: Tensor,
        direction_offsets: Tensor,
        heads: Tensor,
        attention: Tensor,
        mlp: Tensor,
    ) -> tuple[Tensor, ...]:
        changed = Changed(
            *(layers, indices, gains, offsets, places, directions),
            *(direction_gains, direction_offsets, heads, attention, mlp),
        )
        return self.run(pixels, changed)

    def run(self, pixels: Tensor, changed: Changed) -> tuple[Tensor, ...]:
        """What `forward` returns."""

        def features(layer: int, mlp_in: Tensor, stream: Tensor) -> Tensor:
            return torch.zeros_like(stream)

        residual, attn_outs, mlp_outs, added, mlp_ins = run_changed(self.vision, pixels, changed, features)
        return self.vision.explain(residual, attn_outs, mlp_outs, mlp_ins, added)


class RerunGraph(ChangedGraph):
    """Features are of the CLT.

    Args:
        tables: precision of the encoders, as of `vision`'s.
    """

    vision: AttributionGraph

    def __init__(self, vision: AttributionGraph, clt: CrossLayerTranscoder, tables: torch.dtype) -> None:
        super().__init__(vision)
        self.layers, self.features = clt.layers, clt.features
        self.readers = served_encoders(clt, tables)  # of all tokens, and exact: `variants.preselect` is of `encoders`
        self.codes = nn.ModuleList(TokenCode(encoder.sparsifier, tables) for encoder in clt.encoders)
        self.sources = [clt.architecture.sources(target) for target in range(clt.layers)]
        self.decoders = nn.ModuleList(nn.ModuleList(map(Int8Decoder, decoder.weights)) for decoder in clt.decoders)

    def run(self, pixels: Tensor, changed: Changed) -> tuple[Tensor, ...]:
        """As `ChangedGraph`."""
        layers, indices = changed.layers, changed.indices
        vision, codes = self.vision, []
        difference = torch.zeros_like(changed.gains).transpose(1, 2)  # [B, T, n] of the layers so far
        activations = torch.zeros_like(changed.gains[..., 0])  # [B, n] z of [CLS]

        def features(layer: int, mlp_in: Tensor, stream: Tensor) -> Tensor:
            nonlocal difference, activations
            code = self.codes[layer](self.readers[layer](mlp_in), self.types[: mlp_in.shape[1]])
            z = dense(code, self.features).index_select(-1, indices)  # [B, t, n]
            codes.append(tuple(self._of_cls(part) for part in code))
            difference = difference[:, : z.shape[1]] + changed.difference(z, layer)
            activations = activations + z[:, 0] * changed.of_layer(layer)
            return difference @ self._table(layer, changed)

        residual, attn_outs, mlp_outs, added, _ = run_changed(vision, pixels, changed, features)
        code_indices, values = (torch.stack(part, dim=1) for part in zip(*codes, strict=True))  # [B, L, k]
        written, to_last = vision.decode(code_indices, values)
        error = mlp_outs.sum(1) - written.sum(1) - vision.bias
        of_layer = torch.stack([changed.of_layer(layer) for layer in range(self.layers)])  # [L, n]
        by_layer = difference * of_layer  # [B, L, n]: `difference` is that of [CLS] by now
        more = by_layer @ vision.directions.index_select(0, layers * self.features + indices).float()
        if earlier := vision.earlier:
            at = layers.clamp_max(earlier - 1) * self.features + indices
            before = by_layer[:, :earlier] @ vision.last_decoders.index_select(0, at).float()
            to_last = to_last + torch.cat([before, more[:, -1:]], dim=1)
        else:
            to_last = to_last + more[:, -1:]
        components = vision.components(attn_outs, written + more, error, added - more.sum(1))

        at_place = code_indices[..., None] == indices  # [B, L, k, n]
        changed_there = (at_place.to(values.dtype) @ of_layer[..., None])[..., 0]  # also where no feature is changed
        values = values.where(changed_there == 0, 0.0)
        values = torch.cat([values, activations[:, None] * of_layer + by_layer], dim=-1)
        code_indices = torch.cat([code_indices, indices.expand(*by_layer.shape)], dim=-1)
        return vision.account(residual, components, mlp_outs, code_indices, values, to_last)

    def _of_cls(self, part: Tensor) -> Tensor:
        """What a token code has at [CLS] [B, k of the vision graph]."""
        part = part[:, 0, : self.vision.k]
        return F.pad(part, (0, self.vision.k - part.shape[-1]))

    def _table(self, target: int, changed: Changed) -> Tensor:
        """What the features write to one target's MLP output [n, d], 0 for those of layers that do not write to it."""
        decoders: Any = self.decoders[target]
        written = torch.zeros_like(self.vision.prior)
        for source, decoder in zip(self.sources[target], decoders, strict=True):
            rows, scales = decoder.rows_of(changed.indices)
            written = written + rows * (scales * changed.of_layer(source))[:, None]
        return written
