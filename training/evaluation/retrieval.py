"""Cross-layer feature retrieval: for a query image, the images with the nearest sparse code at [CLS], layer by layer.

Similarity is the cosine of two sparse codes [F]. The score of a layer is the share of the k nearest images (excluding
the query) with the query's class, averaged over queries; chance is that share for random images. CLIP's own embedding
is the reference.

n images, L layers, F features, K places of a code, D embedding size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from vitrine.models.bootstrap import Bootstrap
from vitrine.models.dictionary.sparsify import Code
from vitrine.training.evaluation.results import Neighbours, Retrieval

NEAREST = 5
QUERIES = 1000
EXAMPLES = 4
_CHUNK = 256  # queries compared with all images at once


class Gallery:
    """The codes, embeddings and labels of all images."""

    def __init__(self, layers: int, features: int) -> None:
        self.layers, self.features = layers, features
        self._codes: list[list[sparse.csr_array]] = [[] for _ in range(layers)]
        self._embeddings: list[NDArray[np.float32]] = []
        self._truth: list[Tensor] = []

    def update(self, codes: list[Code], embeddings: Tensor, truth: Tensor) -> None:
        """Codes at [CLS] [B, K] by layer, CLIP's embeddings [B, D], label indices [B]."""
        for layer_codes, code in zip(self._codes, codes, strict=True):
            layer_codes.append(_rows(code.indices.cpu().numpy(), code.values.float().cpu().numpy(), self.features))
        self._embeddings.append(embeddings.float().cpu().numpy())
        self._truth.append(truth.cpu())

    def figures(self, labels: tuple[str, ...], seed: int) -> Retrieval | None:
        """Scores by layer, with examples of different classes; None with fewer than k + 1 images of known class."""
        if not self._truth:
            return None
        truth = torch.cat(self._truth).numpy()
        if len(truth) <= NEAREST:
            return None
        queries = np.random.default_rng(seed).permutation(len(truth))[:QUERIES]
        examples = _first_of_each_class(truth[queries])
        bootstrap = Bootstrap(len(queries), seed=seed)
        scores, shown = [], []
        for parts in self._codes:
            near = nearest(sparse.vstack(parts).tocsr(), queries, NEAREST)
            scores.append(bootstrap.estimate(_same_class(truth, queries, near)))
            shown.append(near[examples])
        by_embedding = nearest(sparse.csr_array(np.concatenate(self._embeddings)), queries, NEAREST)
        sizes = np.bincount(truth)[truth[queries]]
        return Retrieval(
            k=NEAREST,
            queries=len(queries),
            layers=scores,
            embedding=bootstrap.estimate(_same_class(truth, queries, by_embedding)),
            chance=float((sizes - 1).mean() / (len(truth) - 1)),
            examples=[
                Neighbours(
                    query=int(queries[query]),
                    label=labels[truth[queries[query]]],
                    layers=[near[at].tolist() for near in shown],
                    labels=[[labels[truth[image]] for image in near[at]] for near in shown],
                )
                for at, query in enumerate(examples)
            ],
        )


def nearest(rows: sparse.csr_array, queries: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The k images with the largest cosine to each query [q, k], best first, without the query itself; ties by index.
    An image without any active feature has cosine 0 with every other."""
    norms = np.sqrt(rows.multiply(rows).sum(axis=1))
    unit = sparse.diags_array(1 / np.where(norms > 0, norms, 1)) @ rows
    neighbours = []
    for at in range(0, len(queries), _CHUNK):
        chunk = queries[at : at + _CHUNK]
        similarity = (unit[chunk] @ unit.T).toarray()
        similarity[np.arange(len(chunk)), chunk] = -np.inf
        neighbours.append(np.argsort(-similarity, axis=1, kind="stable")[:, :k])
    return np.concatenate(neighbours)


def _rows(indices: NDArray[np.int64], values: NDArray[np.float32], features: int) -> sparse.csr_array:
    """Codes [B, K] as sparse rows [B, F]."""
    images, places = indices.shape
    starts = np.arange(0, images * places + 1, places)
    # a copy, as eliminate_zeros moves what is left of the values it is given
    rows = sparse.csr_array((values.ravel(), indices.ravel(), starts), shape=(images, features), copy=True)
    rows.eliminate_zeros()
    return rows


def _same_class(truth: NDArray[np.int64], queries: NDArray[np.int64], near: NDArray[np.int64]) -> NDArray[np.float64]:
    """For each query, the share of its neighbours with its class."""
    return (truth[near] == truth[queries][:, None]).mean(axis=1)


def _first_of_each_class(truth: NDArray[np.int64]) -> list[int]:
    """The first query of each class, at most `EXAMPLES`."""
    _, first = np.unique(truth, return_index=True)
    return sorted(first.tolist())[:EXAMPLES]
