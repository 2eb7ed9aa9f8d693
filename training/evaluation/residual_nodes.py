"""Nodes of residual SAEs that curves insert and delete, and channels of the stream beside them (arXiv 2509.17401).

The paper's node is a feature of a layer over all tokens, or the error of a layer; usual values are medians over images.
All nodes that are not inserted are set to their medians, silent ones too. The rankings, the largest score first:

    relevance        (z - median) times the gradient at z with what LibraGrad holds fast, errors being leaves: ours
    through_errors   the same with gradients that go on through errors, too
    plain            relevance with nothing held fast: of norms, attention, MLPs and what the SAEs standardise by
    gradient         z times CLIP's own gradient, through errors, nothing held fast
    activation       z, summed over tokens; of an error its length, in units of the tokens' standard deviations
    random           a random number
    tokens           relevance, of nodes that are a feature, or the error, at one token
    neurons          relevance of the stream's channels, over all tokens, in place of features; there is no error

L blocks, T tokens, d width, F features of a layer, N nodes: layer by layer its features, then its error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.residual_replacement import ResidualReplacement
from vitrine.models.dictionary.residual_sae import ResidualSaes
from vitrine.training.evaluation.code import Code
from vitrine.training.evaluation.edited_stream import EditedStream
from vitrine.training.evaluation.nodes import Nodes, Ranked
from vitrine.training.evaluation.relevance import Medians, Relevance

SAE_RANKINGS = ("relevance", "through_errors", "plain", "gradient", "activation", "random")


class ResidualNodes:
    """Features and errors, over all tokens.

    Args:
        clip, saes: on the same device; the SAEs in evaluation mode.
        medians: over other images, on that device.
        seed: of the random ranking.
    """

    def __init__(self, clip: Clip, saes: ResidualSaes, medians: Medians, seed: int = 0) -> None:
        self.clip, self.medians = clip, medians
        self.model = ResidualReplacement(clip.tower, saes)
        self.edited = EditedStream(self.model, medians)
        self.leaves = Relevance(clip.tower, saes, medians, leaf_error=True)
        self.through = Relevance(clip.tower, saes, medians)
        self.sizes = [features + 1 for features in saes.architecture.features]
        self._generator = torch.Generator().manual_seed(seed)

    def ranked(self, pixels: Tensor, direction: Tensor) -> Ranked:
        """As `Nodes`."""
        scaled = direction * self.clip.logit_scale
        gradients, streams = stream_gradients(self.model, pixels, scaled, leaf_error=False)
        with torch.no_grad():
            codes = [self._code(layer, stream) for layer, stream in enumerate(streams)]
            of_leaves = stream_gradients(self.model, pixels, scaled, leaf_error=True)[0]
            plain = (code.relevance(gradient)[:2] for code, gradient in zip(codes, of_leaves, strict=True))
            own = (
                (code.products(gradient) * code.values, (code.errors * gradient).sum(-1))
                for code, gradient in zip(codes, gradients, strict=True)
            )
            lengths = ((code.values, (code.errors / code.scale).norm(dim=-1)) for code in codes)
            scores = {
                "relevance": _over_tokens(relevances(self.leaves, pixels, scaled)),
                "through_errors": _over_tokens(relevances(self.through, pixels, scaled)),
                "plain": _over_tokens(plain),
                "gradient": _over_tokens(own),
                "activation": _over_tokens(lengths),
                "random": torch.rand(sum(self.sizes), generator=self._generator).to(scaled),
            }
            active = _over_tokens((code.active.float(), torch.ones_like(code.errors[..., 0])) for code in codes) > 0
        return Ranked(scores, active, torch.ones_like(active))

    def run(self, embedded: Tensor, edited: Tensor) -> Tensor:
        """As `Nodes`."""
        return self.edited(embedded, [of_layer[:, None] for of_layer in edited.split(self.sizes, dim=1)])

    def _code(self, layer: int, stream: Tensor) -> Code:
        medians = self.medians.activations[layer], self.medians.errors[layer]
        return Code(self.model.saes, layer, stream, medians)


class ResidualTokenNodes:
    """The same features and errors, each at one token."""

    def __init__(self, of: ResidualNodes) -> None:
        self.of, tokens = of, of.clip.tower.tokens
        self._shapes = [(tokens, size) for size in of.sizes]

    @torch.no_grad()
    def ranked(self, pixels: Tensor, direction: Tensor) -> Ranked:
        """As `Nodes`."""
        scaled = direction * self.of.clip.logit_scale
        parts = list(relevances(self.of.leaves, pixels, scaled))
        scores = torch.cat([torch.cat([z[0], error[0, :, None]], dim=-1).flatten() for z, error in parts])
        stream, active = self.of.clip.tower.embed(pixels), []
        for layer in range(len(self._shapes)):
            stream = self.of.model.block(layer, stream)
            fires = Code(self.of.model.saes, layer, stream).active[0]
            active.append(torch.cat([fires, torch.ones_like(fires[:, :1])], dim=-1).flatten())
        mask = torch.cat(active)
        return Ranked({"tokens": scores}, mask, torch.ones_like(mask))

    def run(self, embedded: Tensor, edited: Tensor) -> Tensor:
        """As `Nodes`."""
        parts = edited.split([tokens * size for tokens, size in self._shapes], dim=1)
        return self.of.edited(
            embedded, [part.unflatten(1, shape) for part, shape in zip(parts, self._shapes, strict=True)]
        )


class NeuronNodes:
    """Channels of the stream after every block but the last, over all tokens, with LibraGrad's gradient."""

    def __init__(self, of: ResidualNodes) -> None:
        self.of = of

    @torch.no_grad()
    def ranked(self, pixels: Tensor, direction: Tensor) -> Ranked:
        """As `Nodes`."""
        walk = self.of.through.walk(pixels, (direction * self.of.clip.logit_scale)[None])
        gradients = []
        while walk.layer >= 0:
            gradients.append(walk.gradient[0])
            walk.back()
        stream, scores = self.of.clip.tower.embed(pixels), []
        for layer, gradient in enumerate(reversed(gradients)):
            stream = self.of.model.block(layer, stream)
            scores.append((gradient * (stream[0] - self.of.medians.streams[layer])).sum(0))
        flat = torch.cat(scores)
        everything = torch.ones_like(flat, dtype=torch.bool)
        return Ranked({"neurons": flat}, everything, everything)

    @torch.no_grad()
    def run(self, embedded: Tensor, edited: Tensor) -> Tensor:
        """As `Nodes`."""
        model, stream, last = self.of.model, embedded, self.of.model.tower.layers - 1
        for layer, of_layer in enumerate(edited.chunk(last, dim=1)):
            stream = model.block(layer, stream)
            stream = torch.where(of_layer[:, None], self.of.medians.streams[layer], stream)
        return model.block(last, stream, cls_only=True)[:, 0]


def relevances(relevance: Relevance, pixels: Tensor, scaled: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(features [1, T, F], errors [1, T]) of one image's layers, the first first."""
    layers = [(of_layer.features, of_layer.errors) for of_layer in relevance(pixels, scaled[None])]
    return reversed(layers)


@torch.enable_grad()
def stream_gradients(
    model: ResidualReplacement, pixels: Tensor, scaled: Tensor, *, leaf_error: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """(true gradients of a logit at the stream after every block but the last [B, T, d] each, those streams).

    Args:
        pixels: normalised [B, 3, H, W].
        scaled: [D] the logit's direction, times CLIP's logit scale.
        leaf_error: gradients go through SAEs, encoders and standardising, and through no errors.
    """
    tower, streams = model.tower, []
    stream = tower.embed(pixels).detach().requires_grad_()
    for layer in range(tower.layers):
        stream = model.block(layer, stream)
        if layer < model.saes.layers:
            if leaf_error:
                stream = model.replace(layer, stream, "all", keep_error=True)[1]
            streams.append(stream)
    logit = torch.nn.functional.normalize(tower.head(stream[:, 0]), dim=-1) @ scaled
    gradients = torch.autograd.grad(logit.sum(), streams)
    return list(gradients), [of_layer.detach() for of_layer in streams]


def _over_tokens(layers: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Features [1, T, F] and errors [1, T] of each layer, summed over tokens: [N]."""
    return torch.cat([torch.cat([features[0].sum(0), errors.sum(1)]) for features, errors in layers])


def residual_nodes(clip: Clip, saes: ResidualSaes, medians: Medians, seed: int = 0) -> list[Nodes]:
    """Every kind of nodes above."""
    nodes = ResidualNodes(clip, saes, medians, seed)
    return [nodes, ResidualTokenNodes(nodes), NeuronNodes(nodes)]
