"""Runs the graphs of residual SAEs: an image's trace, and sources followed back one block."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from vitrine.models.account.circuit import Wanted
from vitrine.models.account.residual import ResidualTrace, feature_accounts, logit_accounts
from vitrine.models.account.sources import Sources
from vitrine.models.bundle.layout import (
    RESIDUAL_HELD,
    RESIDUAL_OUTPUTS,
    RESIDUAL_OUTPUTS_EMBEDDINGS,
    RESIDUAL_STARTS,
    RESIDUAL_STARTS_LOGIT,
    RESIDUAL_TRACE,
    RESIDUAL_TRACE_OUTPUTS,
    residual_file,
)
from vitrine.service.engine.fit import check_graph
from vitrine.service.engine.fit_residual import residual_block_graph, residual_trace_graph
from vitrine.service.engine.on_first_use import GraphsOnFirstUse
from vitrine.service.engine.runtime import open_session


class Sessions(NamedTuple):
    """Of a bundle's graphs of residual SAEs."""

    trace: InferenceSession
    blocks: list[InferenceSession]


class ResidualGraphs(GraphsOnFirstUse[Sessions]):
    """The trace with the SAEs' codes, and a graph for each block. Thread-safe. They compute in float32, whatever the
    vision graph's precision."""

    name = "residual SAEs"

    @property
    def layers(self) -> int:
        """Blocks: one more than SAEs."""
        return self.bundle.manifest.shape.layers

    def open_sessions(self) -> Sessions:
        """As `GraphsOnFirstUse`."""
        path, runtime = self.bundle.path, self.runtime
        trace = open_session(path / RESIDUAL_TRACE, runtime)
        return Sessions(trace, [open_session(path / residual_file(block), runtime) for block in range(self.layers)])

    def check(self) -> None:
        """As `GraphsOnFirstUse`."""
        manifest, sessions = self.bundle.manifest, self.open()
        check_graph(self.bundle, residual_trace_graph(manifest), sessions.trace)
        noise = np.random.default_rng(0).standard_normal((3, *manifest.preprocessing.size)).astype(np.float32)
        trace = self.trace(noise)
        heads, neurons = trace.weights.shape[1], trace.gates.shape[-1]
        for block, session in enumerate(sessions.blocks):
            graph = residual_block_graph(manifest, block, heads, neurons)
            feeds = dict(zip(RESIDUAL_STARTS_LOGIT, (np.ones((1, manifest.shape.width), np.float32),), strict=True))
            if block < self.layers - 1:
                feeds = _starts(trace, block, np.zeros(1, np.int64), np.zeros(1, np.int64))
            check_graph(self.bundle, graph, session, feeds | _held(trace, block))

    def trace(self, pixels: NDArray[np.float32]) -> ResidualTrace:
        """Of one image [3, H, W]."""
        outputs = self.open().trace.run(list(RESIDUAL_TRACE_OUTPUTS), {"pixels": pixels[None]})
        return ResidualTrace.from_batch(dict(zip(RESIDUAL_TRACE_OUTPUTS, outputs, strict=True)), 0)

    def of_directions(self, trace: ResidualTrace, directions: NDArray[np.floating]) -> list[Sources]:
        """The accounts of directions in embedding space [n, D], one layer down."""
        bundle, scale = self.bundle, self.bundle.manifest.logit_scale
        starts = trace.starts(directions, bundle.fold, scale).astype(np.float32)
        outputs = self._run(trace, self.layers - 1, dict(zip(RESIDUAL_STARTS_LOGIT, (starts,), strict=True)))
        return logit_accounts(trace, outputs, directions, bundle.beta, scale)

    def of_features(self, trace: ResidualTrace, wanted: Wanted) -> list[Sources]:
        """The accounts of features' pre-activations, one layer down; in their order."""
        found: list[Sources | None] = [None] * len(wanted.layers)
        for layer in np.unique(wanted.layers).tolist():
            places = np.flatnonzero(wanted.layers == layer)
            starts = _starts(trace, layer, wanted.indices[places], wanted.tokens[places])
            outputs = self._run(trace, layer, starts)
            accounts = feature_accounts(trace, layer, outputs, wanted.activations[places])
            for place, account in zip(places.tolist(), accounts, strict=True):
                found[place] = account
        return [account for account in found if account is not None]

    def target(self, pixels: NDArray[np.float32], direction: NDArray[np.floating]) -> tuple[ResidualTrace, Sources]:
        """One image's trace, and the account of one direction [1, D]."""
        trace = self.trace(pixels)
        (account,) = self.of_directions(trace, direction)
        return trace, account

    def _run(self, trace: ResidualTrace, block: int, starts: dict[str, Any]) -> list[Any]:
        names = RESIDUAL_OUTPUTS if block else RESIDUAL_OUTPUTS_EMBEDDINGS
        return self.open().blocks[block].run(list(names), starts | _held(trace, block))


def _starts(
    trace: ResidualTrace, layer: int, features: NDArray[np.integer], tokens: NDArray[np.integer]
) -> dict[str, Any]:
    """Features of a layer's SAE at tokens [n] as inputs of the graph of its block."""
    assert trace.deviations is not None
    at = (features.astype(np.int64), tokens.astype(np.int64), trace.deviations[layer])
    return dict(zip(RESIDUAL_STARTS, at, strict=True))


def _held(trace: ResidualTrace, block: int) -> dict[str, Any]:
    """A trace as inputs of the graph that goes back through a block; below block 0 there is no code."""
    return dict(zip(RESIDUAL_HELD, trace.through(block), strict=False))
