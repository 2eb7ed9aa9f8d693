"""Why a head looks there: the score of one query and one key, split over what was written. numpy only.

A head of block l attends from token q to token k by the softmax, over all keys, of

    score(q, k) = <Q[q], K[k]> / sqrt(d / H),    Q = W_Q LN1(x) + b_Q,    K = W_K LN1(x) + b_K,

x the stream before block l. With the denominators of the LayerNorms and the attention weights of all earlier layers
held fast, as in `models.account.sources`, both Q[q] and K[k] are sums over all that was written before block l, at any
token: embeddings, features, decoder biases, errors; and constants. So the score is bilinear,

    score = sum over a of the query's parts, b of the key's parts    <Q_a, K_b> / sqrt(d / H).

Its accounts are

    of the query    sum_a <Q_a, K[k]> / sqrt(d / H)    the key held at its whole value: the source account of the
                                                       direction W_Q' K[k] / sqrt(d / H), started at LN1 at token q
    of the key      sum_b <Q[q], K_b> / sqrt(d / H)    likewise, of W_K' Q[q] / sqrt(d / H), at token k
    of pairs        <Q_a, K_b> / sqrt(d / H)           for a feature a over all tokens: the account of the key in which
                                                       Q_a has the place of Q[q]. Q_a: from the accounts of the d / H
                                                       rows of W_Q, at token q

and each of the first two adds up to the score, as do all pairs.

The softmax sees only differences between keys: what adds the same to every key's score moves no attention, and biases
and what all tokens have in common do just that. So *relative* accounts, which say why the head looks at k rather than
anywhere, are of score(q, k) less the mean of score(q, .) over all T keys: K[k] less the mean key takes K[k]'s place
above. It is the logarithm of the attention weight, less the mean of those of all keys.

The graphs: `models.graph.scores`, `models.graph.sources`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.models.account.sources import Sources, Trace, accounts_of


class Starts(NamedTuple):
    """Where directions start in sources.onnx, at LN1 of one layer."""

    directions: Array  # [n, d] of LN1's output
    token: int  # at which they start; T more: less the mean over all tokens


@dataclass(frozen=True)
class AttentionScore:
    """One head's score for one query and one key on one image. The head's parts are those of scores.onnx."""

    query: int  # token
    key: int
    relative: bool  # to the mean over all keys
    weights: Array  # [T] attention weights of the query
    queries: Array  # [T, d / H]
    keys: Array  # [T, d / H]
    rows: Array  # [2, d / H, d] of W_Q and W_K
    biases: Array  # [2, d / H]

    @classmethod
    def of(
        cls,
        trace: Trace,
        outputs: Mapping[str, Any],
        layer: int,
        head: int,
        query: int,
        key: int | None,
        relative: bool,
    ) -> AttentionScore:
        """The first head in the outputs of scores.onnx. key: None: the token that the query attends to most."""
        weights = trace.weights[layer, head, query]
        parts = {name: values[0].astype(np.float64) for name, values in outputs.items()}
        return cls(query, int(weights.argmax()) if key is None else key, relative, weights, **parts)

    @property
    def scores(self) -> Array:
        """[T]: of the query with every key."""
        return self.keys @ self.queries[self.query] * self._scale

    @property
    def total(self) -> float:
        """What the accounts are of: the score; relative, less its mean over all keys."""
        return float(self.queries[self.query] @ self._key * self._scale)

    @property
    def weight(self) -> float:
        """The attention weight."""
        return float(self.weights[self.key])

    def query_start(self) -> Starts:
        """Of the query's account, one direction."""
        return Starts((self._key * self._scale @ self.rows[0])[None], self.query)

    def key_start(self) -> Starts:
        """Of the key's account, one direction."""
        return self.key_starts(self.queries[self.query][None])

    def query_row_starts(self) -> Starts:
        """Of the components of the query, d / H directions."""
        return Starts(self.rows[0], self.query)

    def key_starts(self, queries: Array) -> Starts:
        """Of the key's accounts with other vectors [n, d / H] in the place of the query."""
        return Starts(queries * self._scale @ self.rows[1], self.key + len(self.keys) * self.relative)

    def query_account(self, trace: Trace, outputs: Mapping[str, Any]) -> Sources:
        """From what sources.onnx gave for `query_start`."""
        constant = self.biases[0] @ self._key * self._scale
        return accounts_of(trace, outputs, np.array([self.total]), np.array([constant]))[0]

    def key_account(self, trace: Trace, outputs: Mapping[str, Any]) -> Sources:
        """From what sources.onnx gave for `key_start`."""
        constant = 0.0 if self.relative else self.biases[1] @ self.queries[self.query] * self._scale
        return accounts_of(trace, outputs, np.array([self.total]), np.array([constant]))[0]

    @property
    def _key(self) -> Array:
        """[d / H]"""
        key = self.keys[self.key]
        return key - self.keys.mean(0) if self.relative else key

    @property
    def _scale(self) -> float:
        return float(self.queries.shape[-1]) ** -0.5


class Pair(NamedTuple):
    """What two features, each over all tokens, add to a score."""

    query: tuple[int, int]  # (layer, index) of the query's feature
    key: tuple[int, int]
    contribution: float


def feature_parts(trace: Trace, outputs: Mapping[str, Any], features: Sequence[tuple[int, int]]) -> Array:
    """[m, n]: what m features (layer, index) contribute over all tokens to each of n accounts of sources.onnx."""
    assert trace.indices is not None
    parts = np.zeros((len(features), len(outputs["features"])))
    for place, (layer, index) in enumerate(features):
        fires = trace.indices[layer] == index  # [T, k]
        parts[place] = outputs["features"][:, layer, fires].sum(-1, dtype=np.float64)
    return parts


def pairs(trace: Trace, outputs: Mapping[str, Any], queries: Sequence[tuple[int, int]], count: int) -> list[Pair]:
    """The `count` largest pairs of each of n query features with any key feature, from what sources.onnx gave for
    `AttentionScore.key_starts` of their parts of the query. Not sorted across query features."""
    nothing = np.zeros(len(queries))
    found: list[Pair] = []
    for query, account in zip(queries, accounts_of(trace, outputs, nothing, nothing), strict=True):
        columns: tuple[NDArray[Any], ...] = tuple(part[:count] for part in account.by_feature())
        for layer, index, contribution in zip(*(column.tolist() for column in columns), strict=True):
            found.append(Pair(query, (layer, index), contribution))
    return found


def largest(found: Sequence[Pair], count: int) -> list[Pair]:
    """The `count` pairs with the largest |contribution|, the largest first."""
    return sorted(found, key=lambda pair: -abs(pair.contribution))[:count]
