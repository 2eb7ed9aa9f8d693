"""The circuit that many images have in common, by residual SAEs: as the paper prunes it (arXiv 2509.17401).

A node is a feature over all tokens, or the error of a layer; relevances (`training.evaluation.relevance`) and edges are
means over images, of one class for example, each with its own target. Walked is all images together, one layer at a
time (`models.account.walk`): what was kept of a layer is kept in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrine.models.account.ledger import Array
from vitrine.models.account.walk import WalkedLayer, walk
from vitrine.training.evaluation.relevance import Kept, Relevance, Walk


def residual_circuit(
    relevance: Relevance,
    images: Iterable[tuple[Tensor, Tensor]],
    tau: float,
    *,
    hierarchical: bool = True,
    most: int | None = None,
) -> list[WalkedLayer]:
    """The circuit, the last layer first; its nodes are numbered as in `LayerRelevance.nodes`: features, then the error.
    Of a tower of one layer it is empty.

    Args:
        images: batches of normalised pixels [B, 3, H, W] and their directions, as `Relevance` takes them. The stream
            before every block of all of them is kept meanwhile: at B/16 7 MB an image.
        hierarchical: whether relevance below is what flows through the kept nodes alone. Otherwise it is that of the
            whole pass, and the edges into kept nodes are told beside it.
        tau, most: see `walk`.
    """
    walks = [relevance.walk(pixels, direction) for pixels, direction in images]
    if not walks or walks[0].layer < 0:
        return []
    count = sum(len(of_batch.logits) for of_batch in walks)

    def mean(parts: Iterable[Tensor]) -> Array:
        """Over the images of all batches, [B, S] each: [S]."""
        return sum(part.double().sum(0) for part in parts).cpu().numpy() / count  # type: ignore[union-attr]

    def into(_layer: int, nodes: NDArray[np.integer], _relevance: Array) -> tuple[Array, Array | None]:
        numbers = nodes.tolist()
        rows = zip(*(of_batch.edges(numbers) for of_batch in walks), strict=True)
        edges = np.stack([mean(row) for row in rows])
        for of_batch in walks:
            of_batch.back(_kept(of_batch, numbers) if hierarchical else None)
        return edges, None if hierarchical else mean(of_batch.relevance().nodes for of_batch in walks)

    of_logit = mean(of_batch.relevance().nodes for of_batch in walks)
    return walk(walks[0].layer, of_logit[None], into, tau, most)


def _kept(of_batch: Walk, nodes: list[int]) -> Kept:
    """Nodes of the layer where a walk is."""
    features = of_batch.of.saes.architecture.features[of_batch.layer]
    mask = torch.zeros(features + 1, dtype=torch.bool, device=of_batch.logits.device)
    mask[nodes] = True
    return Kept(mask[:-1], bool(mask[-1]))
