"""What the features of residual SAEs, over many images, have to do with a logit: relevance (arXiv 2509.17401).

The logit, of a direction in embedding space, is followed back through whole blocks with what LibraGrad holds fast
(`models.graph.gated`). With g_t its gradient at the stream after block l, s_t that token's standard deviation, z and
err what the SAE makes of it, and m, n their medians over images (0 if none are given), the nodes of that layer are

    a feature at a token    s_t <g_t, W_dec[f]> (z - m)            summed over tokens: the paper's node
    the error               sum of <g_t, err_t - n_t>

and, so that all of a layer add up to the logit exactly,

    bias         sum of s_t <g_t, b_dec>
    baseline     the same sums for the medians: sum of s_t <g_t, W_dec[f]> m, and of <g_t, n_t>
    constants    of the blocks above, of encoders that were passed, and of the logit
    leaves       what ended at the layers above: see below

How g goes on to the layer below is a choice. The paper's `leaf_error`: through the features' encoders alone, so that
errors are leaves and what they carried is told as such; else through the stream itself, errors and all. And through
all features, or, as a circuit is walked (*hierarchical*), through those that were kept.

A pass keeps the stream before every block and computes a block's attention and gates again on the way back: L T d
numbers an image (7 MB at B/16 in float32), and of one layer at a time some times B T (F + M).

L layers, B images, T tokens, d width, D embedding size, F features of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitrine.models.clip.attention import Attention
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.residual_sae import ResidualSaes
from vitrine.models.graph.back import through_norm
from vitrine.models.graph.gated import GatedBlock, Held
from vitrine.models.graph.gated_trace import hold
from vitrine.models.graph.vision import denominator
from vitrine.training.evaluation.code import Code


class Medians(NamedTuple):
    """Over images (`training.evaluation.medians`)."""

    activations: list[Tensor]  # L - 1 of [T, F]
    errors: Tensor  # [L - 1, T, d]
    streams: Tensor  # [L - 1, T, d] after the blocks


class Kept(NamedTuple):
    """Nodes of a layer through which the gradient goes on."""

    features: Tensor  # [F] bool, or at each token [T, F]
    error: bool


@dataclass(frozen=True)
class LayerRelevance:
    """The relevance of one layer's nodes in B images."""

    layer: int
    features: Tensor  # [B, T, F]
    errors: Tensor  # [B, T]
    bias: Tensor  # [B]
    baseline: Tensor  # [B]
    constants: Tensor  # [B]
    leaves: Tensor  # [B]

    @property
    def nodes(self) -> Tensor:
        """[B, F + 1]: the paper's nodes, all tokens summed, the error last."""
        return torch.cat([self.features.sum(1), self.errors.sum(1, keepdim=True)], dim=1)

    @property
    def total(self) -> Tensor:
        """[B]: the logit."""
        return self.nodes.sum(1) + self.bias + self.baseline + self.constants + self.leaves


class Relevance:
    """Of a tower and its SAEs, on the same device, in evaluation mode.

    Args:
        medians: about which relevance is measured; None: about 0.
        leaf_error: nothing flows back through errors.
    """

    def __init__(
        self, tower: Tower, saes: ResidualSaes, medians: Medians | None = None, *, leaf_error: bool = False
    ) -> None:
        self.tower, self.saes, self.medians, self.leaf_error = tower, saes, medians, leaf_error
        self.blocks = [GatedBlock(block) for block in tower.blocks]
        self.attention = [Attention(block) for block in tower.blocks]

    def __call__(self, pixels: Tensor, direction: Tensor) -> Iterator[LayerRelevance]:
        """Every layer that has an SAE, the last first, with all features passed; of a tower of one layer none.

        Args:
            pixels: normalised [B, 3, H, W].
            direction: [D], or [B, D] of each image, times CLIP's logit scale: of a label's embedding, or of that minus
                the mean over the labels, the paper's target.
        """
        walk = self.walk(pixels, direction)
        while walk.layer >= 0:
            yield walk.relevance()
            walk.back()

    def walk(self, pixels: Tensor, direction: Tensor) -> Walk:
        """The same a layer at a time, through whatever is kept."""
        return Walk(self, pixels, direction)


class Walk:
    """One batch on the way back: at `layer`, the last that has an SAE, at first; -1: at the embeddings, all is done.

    `gradient` [B, T, d] is the logit's at the stream after that block.
    """

    @torch.no_grad()
    def __init__(self, of: Relevance, pixels: Tensor, direction: Tensor) -> None:
        self.of, tower = of, of.tower
        self._streams = [tower.embed(pixels)]
        for block, attention in zip(tower.blocks, of.attention, strict=True):
            self._streams.append(hold(block, attention, self._streams[-1])[1])
        last = self._streams.pop()
        residual, ln, proj = last[:, 0], tower.visual.ln_post, tower.visual.proj
        z = tower.head(residual)
        norm = z.norm(dim=-1)
        read = direction @ proj.T / norm[:, None]  # [B, d] at ln_post's output
        self.logits = (z * direction).sum(-1) / norm  # [B]
        self.gradient = torch.zeros_like(last)
        self.gradient[:, 0] = through_norm(ln, read, denominator(residual, ln))
        self._constants, self._leaves = read @ ln.bias, torch.zeros_like(norm)
        self.layer = tower.layers - 1
        self._through_block()

    @torch.no_grad()
    def relevance(self) -> LayerRelevance:
        """Of the layer's nodes."""
        assert self._code is not None
        features, errors, baseline = self._code.relevance(self.gradient)
        bias = self._code.of_bias(self.gradient)
        return LayerRelevance(self.layer, features, errors, bias, baseline, self._constants, self._leaves)

    @torch.no_grad()
    def back(self, kept: Kept | None = None) -> None:
        """Go on to the layer below through the nodes `kept`; None: all of them."""
        code, gradient = self._code, self.gradient
        assert code is not None
        through_error = not self.of.leaf_error and (kept is None or kept.error)
        if kept is not None or not through_error:
            products, bias = code.products(gradient), code.of_bias(gradient)
            passed = products if kept is None else products * kept.features
            self.gradient, constants = code.through_encoder(passed)
            self._constants = self._constants + constants
            self._leaves = self._leaves + ((products - passed) * code.values).sum((1, 2)) + bias
            if through_error:
                of_error, constants = code.through_error(gradient)
                self.gradient = self.gradient + of_error
                self._constants = self._constants + constants
            else:
                self._leaves = self._leaves + (code.errors * gradient).sum((1, 2))
        self._through_block()

    @torch.no_grad()
    def edges(self, nodes: Iterable[int]) -> Iterator[Tensor]:
        """The paper's edges: how much of each of these nodes, numbered as in `LayerRelevance.nodes`, came from each
        node of the layer below, [B, F + 1]; 0 of an error that is a leaf. Below the first layer are no nodes."""
        code, block = self._code, self.of.blocks[self.layer]
        assert code is not None
        held, below = self._hold(), self._read(self.layer - 1)
        products = code.products(self.gradient)
        for node in nodes:
            if node < products.shape[-1]:
                of_one = torch.zeros_like(products)
                of_one[..., node] = products[..., node]
                gradient, _ = code.through_encoder(of_one)
            elif self.of.leaf_error:
                gradient = torch.zeros_like(self.gradient)
            else:
                gradient, _ = code.through_error(self.gradient)
            gradient, _ = block(gradient, held)
            of_features, errors, _ = below.relevance(gradient)
            yield torch.cat([of_features.sum(1), errors.sum(1, keepdim=True)], dim=1)

    def _through_block(self) -> None:
        """Through block `layer`, and on to the SAE that reads the stream before it."""
        self.gradient, constants = self.of.blocks[self.layer](self.gradient, self._hold())
        self._constants = self._constants + constants
        self.layer -= 1
        self._code = self._read(self.layer) if self.layer >= 0 else None
        self._streams.pop()

    def _hold(self) -> Held:
        """What block `layer` computes from the stream before it."""
        return hold(self.of.tower.blocks[self.layer], self.of.attention[self.layer], self._streams[-1])[0]

    def _read(self, layer: int) -> Code:
        """The code of the last stream that is left, after block `layer`."""
        medians = self.of.medians
        of_layer = None if medians is None else (medians.activations[layer], medians.errors[layer])
        return Code(self.of.saes, layer, self._streams[-1], of_layer)
