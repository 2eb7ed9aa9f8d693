"""Runs the graphs of source accounts: an image's trace, directions followed back through it, and attention heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from vitrine.models.account.attention_score import AttentionScore, Starts
from vitrine.models.account.circuit import Wanted
from vitrine.models.account.sources import Sources, Trace, accounts, accounts_of, feature_accounts
from vitrine.models.bundle.layout import (
    HEADS,
    HELD,
    SCORES_HELD,
    SCORES_OUTPUTS,
    SOURCES_OUTPUTS,
    STARTS,
    TRACE_OUTPUTS,
    given,
)
from vitrine.service.engine.fit import check_graph, scores_graph, sources_graph, trace_graph
from vitrine.service.engine.on_first_use import GraphsOnFirstUse
from vitrine.service.engine.runtime import open_session


class Sessions(NamedTuple):
    """Of a bundle's graphs of source accounts."""

    trace: InferenceSession
    sources: InferenceSession
    scores: InferenceSession | None  # if the bundle has that


class SourceGraphs(GraphsOnFirstUse[Sessions]):
    """trace.onnx and sources.onnx of a bundle, and scores.onnx if it has that. Thread-safe. They compute in float32,
    whatever the vision graph's precision."""

    name = "source accounts"

    def open_sessions(self) -> Sessions:
        """As `GraphsOnFirstUse`."""
        path, runtime = self.bundle.path, self.runtime
        return Sessions(
            open_session(path / "trace.onnx", runtime),
            open_session(path / "sources.onnx", runtime),
            open_session(path / "scores.onnx", runtime) if self.bundle.has_scores else None,
        )

    def check(self) -> None:
        """As `GraphsOnFirstUse`."""
        manifest, sessions = self.bundle.manifest, self.open()
        check_graph(self.bundle, trace_graph(manifest), sessions.trace)
        noise = np.random.default_rng(0).standard_normal((3, *manifest.preprocessing.size)).astype(np.float32)
        trace = self.trace(noise)
        feeds = self._after_the_last_block(np.ones((1, manifest.shape.width), np.float32)) | _held(trace)
        heads = trace.weights.shape[1]
        check_graph(self.bundle, sources_graph(manifest, heads), sessions.sources, feeds)
        if sessions.scores is not None:
            feeds = _head(0, 0) | {name: feeds[name] for name in SCORES_HELD}
            check_graph(self.bundle, scores_graph(manifest, heads), sessions.scores, feeds)

    def trace(self, pixels: NDArray[np.float32]) -> Trace:
        """Of one image [3, H, W]."""
        names = given(TRACE_OUTPUTS, self._has_features)
        outputs = self.open().trace.run(names, {"pixels": pixels[None]})
        return Trace.from_batch(dict(zip(names, outputs, strict=True)), 0)

    def of_directions(self, trace: Trace, directions: NDArray[np.floating]) -> dict[str, Any]:
        """The outputs of sources.onnx for directions in embedding space [n, D] (`models.account.sources.accounts`)."""
        starts = trace.starts(directions, self.bundle.fold, self.bundle.manifest.logit_scale)
        return self._run(self._after_the_last_block(starts), trace)

    def of_stream(self, trace: Trace, vector: NDArray[np.floating]) -> Sources:
        """The account of the stream's part along a vector [d], at [CLS] after the last block, but for its embedding and
        constants: features and errors."""
        outputs = self._run(self._after_the_last_block(vector[None]), trace)
        (account,) = accounts_of(trace, outputs, np.zeros(1), np.zeros(1))
        return account

    def of_features(self, trace: Trace, wanted: Wanted) -> list[Sources]:
        """The accounts of features' pre-activations."""
        unused = np.zeros((len(wanted.layers), self.bundle.manifest.shape.width), np.float32)
        at = (part.astype(np.int64) for part in (wanted.layers, wanted.tokens, wanted.indices))
        outputs = self._run(dict(zip(STARTS, (unused, *at), strict=True)), trace)
        return feature_accounts(trace, outputs, wanted.activations)

    def attention_score(
        self, trace: Trace, layer: int, head: int, query: int, key: int | None, relative: bool
    ) -> AttentionScore:
        """One head's score; key: None: the token that the query attends to most. Only if the bundle `has_scores`."""
        scores = self.open().scores
        assert scores is not None
        held = _held(trace)
        feeds = _head(layer, head) | {name: held[name] for name in SCORES_HELD}
        outputs = dict(zip(SCORES_OUTPUTS, scores.run(list(SCORES_OUTPUTS), feeds), strict=True))
        return AttentionScore.of(trace, outputs, layer, head, query, key, relative)

    def of_reads(self, trace: Trace, layer: int, starts: Starts) -> dict[str, Any]:
        """The outputs of sources.onnx for directions that start at LN1 of one layer."""
        at = (np.full(len(starts.directions), number, np.int64) for number in (layer, starts.token, -1))
        return self._run(dict(zip(STARTS, (starts.directions.astype(np.float32), *at), strict=True)), trace)

    def target(self, pixels: NDArray[np.float32], direction: NDArray[np.floating]) -> tuple[Trace, Sources]:
        """One image's trace, and the account of one direction [1, D]."""
        trace, outputs = self.run(pixels, direction)
        (account,) = accounts(trace, outputs, direction, self.bundle.beta, self.bundle.manifest.logit_scale)
        return trace, account

    def run(self, pixels: NDArray[np.float32], directions: NDArray[np.floating]) -> tuple[Trace, dict[str, Any]]:
        """One image's trace, and what `of_directions` gives for it."""
        trace = self.trace(pixels)
        return trace, self.of_directions(trace, directions)

    def _run(self, starts: dict[str, Any], trace: Trace) -> dict[str, Any]:
        names = given(SOURCES_OUTPUTS, self._has_features)
        return dict(zip(names, self.open().sources.run(names, starts | _held(trace)), strict=True))

    @property
    def _has_features(self) -> bool:
        return self.bundle.manifest.has_features

    def _after_the_last_block(self, directions: NDArray[np.floating]) -> dict[str, Any]:
        """Starts of directions of the residual [n, d], at [CLS]."""
        count = len(directions)
        layer = np.full(count, self.bundle.manifest.shape.layers, np.int64)
        nothing = np.zeros(count, np.int64)
        return dict(zip(STARTS, (directions.astype(np.float32), layer, nothing, nothing), strict=True))


def _head(layer: int, head: int) -> dict[str, Any]:
    """One head as inputs of scores.onnx."""
    return dict(zip(HEADS, (np.array([layer]), np.array([head])), strict=True))


def _held(trace: Trace) -> dict[str, Any]:
    """A trace as inputs of sources.onnx."""
    names = given(HELD, features=trace.indices is not None)
    return {"attention_weights": trace.weights} | {name: getattr(trace, name) for name in names[1:]}
