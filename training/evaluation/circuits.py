"""The circuit of one image by either kind of dictionary, as it is served, and how large it is, to be compared.

Nodes are features, and errors, at one token, and embeddings. The graph is expanded from the logit
(`models.account.circuit`) within the same limits and pruned by the same shares (`models.account.pruning`), on the CPU.

L layers, B images, D embedding size.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitrine.models.account.circuit import Coded, Limits, Wanted, expand
from vitrine.models.account.ledger import Array
from vitrine.models.account.pruning import prune
from vitrine.models.account.residual import ResidualTrace, logit_accounts
from vitrine.models.account.residual import feature_accounts as residual_accounts
from vitrine.models.account.sources import Sources, Trace, accounts, feature_accounts
from vitrine.models.bundle.layout import HELD, SOURCES_OUTPUTS, TRACE_OUTPUTS
from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.residual_sae import ResidualSaes
from vitrine.models.graph.gated_trace import GatedTraceGraph
from vitrine.models.graph.residual import FeatureSourcesGraph, LogitSourcesGraph
from vitrine.models.graph.sources import SourcesGraph
from vitrine.models.graph.trace import TraceGraph
from vitrine.training.evaluation.sae_results import CircuitFigures

LIMITS = Limits(nodes=256, seconds=60)
_RESIDUAL_TRACE = (
    *("embedding", "scale", "norm", "attention_weights", "before_attention", "before_mlp", "gates", "streams"),
    *("deviations", "indices", "values"),
)


class Circuits(Protocol):
    """The accounts of one dictionary that a circuit is made of."""

    def target(self, pixels: Tensor, direction: Tensor) -> tuple[Coded, Sources]:
        """(trace, the logit's account) of one image [1, 3, H, W], for a direction in embedding space [D]."""
        ...

    def follow(self, trace: Any, wanted: Wanted) -> list[Sources]:
        """The accounts of features' pre-activations."""
        ...


class CltCircuits:
    """Of a Cross-Layer Transcoder."""

    def __init__(self, clip: Clip, clt: CrossLayerTranscoder) -> None:
        tower, clt = deepcopy(clip.tower).cpu(), deepcopy(clt).cpu()
        self.layers, self.width, self.logit_scale = tower.layers, tower.width, clip.logit_scale
        self.trace, self.sources = TraceGraph(tower, clt, torch.float32), SourcesGraph(tower, clt, torch.float32)
        self.fold, self.beta = (part.numpy() for part in tower.fold())

    def target(self, pixels: Tensor, direction: Tensor) -> tuple[Trace, Sources]:
        """As `Circuits`."""
        trace = Trace.from_batch(dict(zip(TRACE_OUTPUTS, _run(self.trace, pixels.cpu()), strict=True)), 0)
        directions = direction.cpu().numpy()[None]
        starts = trace.starts(directions, self.fold, self.logit_scale)
        outputs = self._back(trace, starts, np.array([self.layers]), np.array([0]), np.array([0]))
        return trace, accounts(trace, outputs, directions, self.beta, self.logit_scale)[0]

    def follow(self, trace: Trace, wanted: Wanted) -> list[Sources]:
        """As `Circuits`."""
        unused = np.zeros((len(wanted.layers), self.width), np.float32)
        outputs = self._back(trace, unused, wanted.layers, wanted.tokens, wanted.indices)
        return feature_accounts(trace, outputs, wanted.activations)

    def _back(self, trace: Trace, *starts: NDArray[Any]) -> dict[str, Array]:
        held = (trace.weights, *(getattr(trace, name) for name in HELD[1:]))
        return dict(zip(SOURCES_OUTPUTS, _run(self.sources, *starts, *held), strict=True))


class SaeCircuits:
    """Of residual SAEs."""

    def __init__(self, clip: Clip, saes: ResidualSaes) -> None:
        tower, saes = deepcopy(clip.tower).cpu(), deepcopy(saes).cpu()
        self.last, self.logit_scale = tower.layers - 1, clip.logit_scale
        self.trace, self.of_logit = GatedTraceGraph(tower, saes), LogitSourcesGraph(tower, saes)
        self.of_features = [FeatureSourcesGraph(tower, saes, layer) for layer in range(saes.layers)]
        self.fold, self.beta = (part.numpy() for part in tower.fold())

    def target(self, pixels: Tensor, direction: Tensor) -> tuple[ResidualTrace, Sources]:
        """As `Circuits`."""
        trace = ResidualTrace.from_batch(dict(zip(_RESIDUAL_TRACE, _run(self.trace, pixels.cpu()), strict=True)), 0)
        directions = direction.cpu().numpy()[None]
        starts = trace.starts(directions, self.fold, self.logit_scale)
        outputs = _run(self.of_logit, starts, *trace.through(self.last))
        return trace, logit_accounts(trace, outputs, directions, self.beta, self.logit_scale)[0]

    def follow(self, trace: ResidualTrace, wanted: Wanted) -> list[Sources]:
        """As `Circuits`."""
        found: dict[int, Sources] = {}
        assert trace.deviations is not None  # there are SAEs
        for layer in np.unique(wanted.layers).tolist():
            places = np.flatnonzero(wanted.layers == layer)
            starts = wanted.indices[places], wanted.tokens[places], trace.deviations[layer]
            outputs = _run(self.of_features[layer], *starts, *trace.through(layer))
            of_layer = residual_accounts(trace, layer, outputs, wanted.activations[places])
            found |= dict(zip(places.tolist(), of_layer, strict=True))
        return [found[place] for place in range(len(wanted.layers))]


def circuit_figures(of: Circuits, images: Iterable[tuple[Tensor, Tensor]], limits: Limits = LIMITS) -> CircuitFigures:
    """Medians over images, [1, 3, H, W] each with its direction [D], of which there must be one at least."""
    sizes = [_sizes(of, pixels, direction, limits) for pixels, direction in images]
    medians = {name: median(of_image[name] for of_image in sizes) for name in sizes[0]}
    return CircuitFigures(images=len(sizes), **medians)


def _sizes(of: Circuits, pixels: Tensor, direction: Tensor, limits: Limits) -> dict[str, float]:
    begun = perf_counter()
    trace, target = of.target(pixels, direction)
    graph = expand(trace, target, lambda wanted: of.follow(trace, wanted), limits)
    circuit = prune(graph)
    seconds = perf_counter() - begun
    leaves = graph.leaves
    return {
        "followed": len(graph.expanded),
        "nodes": len(circuit.nodes),
        "edges": len(circuit.weights),
        "replacement": leaves.replacement,
        "completeness": graph.completeness,
        "left_out": leaves.left_out,
        "seconds": seconds,
    }


@torch.no_grad()
def _run(graph: nn.Module, *inputs: Tensor | NDArray[Any]) -> list[Array]:
    """A graph as the service runs it: arrays in, arrays out."""
    return [part.numpy() for part in graph(*(torch.as_tensor(np.asarray(part)) for part in inputs))]
