"""How well a vision graph in one precision agrees with the float32 one, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from vitrine.models.account.ledger import Array, Decomposition, feature_contributions, logits
from vitrine.models.bundle.layout import DETAILS_INPUT, VISION_OUTPUTS
from vitrine.models.bundle.manifest import Agreement
from vitrine.models.precision.instructions import int8_instructions

TOP_FEATURES = 10
DRAWN, CELLS = 4, 7  # pictures that are drawn; cells a side of each


def measure(
    reference: InferenceSession,
    variant: InferenceSession,
    images: Iterable[NDArray[np.float32]],
    labels: Array,
    directions: Array,
    fold: Array,
    done: Callable[[], object] = lambda: None,
) -> Agreement:
    """How well two vision graphs agree on batches of normalised pixels [B, 3, H, W].

    labels: unit embeddings [N, D] of the labels to predict; directions [L, F, d], fold [d, D]: the bundle's tables;
    done: called after every image.
    """
    same_top1, cosines, overlaps = [], [], list[float]()
    for pixels in images:
        for expected, actual in zip(_run(reference, pixels), _run(variant, pixels), strict=True):
            top1 = int(logits(expected.embedding, labels, 1.0).argmax())
            same_top1.append(int(logits(actual.embedding, labels, 1.0).argmax()) == top1)
            ours, theirs = actual.rows @ labels[top1], expected.rows @ labels[top1]
            cosines.append(float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs))))
            if expected.has_features:
                found = [_top_features(parts, directions, fold, labels[top1]) for parts in (actual, expected)]
                overlaps.append(len(found[0] & found[1]) / TOP_FEATURES)
            done()
    return Agreement(
        images=len(cosines),
        top1=float(np.mean(same_top1)),
        ledger_cosine=float(np.mean(cosines)),
        top_features=float(np.mean(overlaps)) if overlaps else None,
        drawn_cosine=drawn_cosine(reference, variant),
        instructions=int8_instructions() or "none",
    )


def drawn_cosine(reference: InferenceSession, variant: InferenceSession) -> float:
    """Mean cosine between two graphs' embeddings of pictures that every machine can draw for itself.

    It tells whether this machine computes what the one that exported the bundle did, and little of real images.
    """
    height, width = reference.get_inputs()[0].shape[2:]
    pixels = drawn_pixels(int(height), int(width))
    pairs = zip(_run(reference, pixels), _run(variant, pixels), strict=True)
    return float(np.mean([expected.embedding @ actual.embedding for expected, actual in pairs]))


def drawn_pixels(height: int, width: int) -> NDArray[np.float32]:
    """Normalised pixels [DRAWN, 3, height, width] of patchworks: cells of one colour, with some noise."""
    random = np.random.default_rng(0)
    cells = random.standard_normal((DRAWN, 3, CELLS, CELLS), np.float32)
    rows, columns = (np.arange(side) * CELLS // side for side in (height, width))
    return cells[:, :, rows][..., columns] + 0.2 * random.standard_normal((DRAWN, 3, height, width), np.float32)


def _run(session: InferenceSession, pixels: NDArray[np.float32]) -> Iterator[Decomposition]:
    feeds: dict[str, NDArray[np.generic]] = {"pixels": pixels}
    if any(given.name == DETAILS_INPUT for given in session.get_inputs()):  # not in bundles of older versions
        feeds[DETAILS_INPUT] = np.array(False)
    has = {output.name for output in session.get_outputs()}
    names = [name for name in VISION_OUTPUTS if name in has]  # without a CLT not all of them
    outputs = dict(zip(names, session.run(names, feeds), strict=True))
    return (Decomposition.from_batch(outputs, image) for image in range(len(pixels)))


def _top_features(parts: Decomposition, directions: Array, fold: Array, direction: Array) -> set[tuple[int, int]]:
    """(layer, feature) of the largest contributions to a logit. direction: the label's embedding."""
    contributions = np.abs(feature_contributions(parts, directions, fold, direction, 1.0))
    order = np.argsort(-contributions, axis=None, kind="stable")[:TOP_FEATURES]
    layers, places = np.unravel_index(order, contributions.shape)
    return {(int(layer), int(parts.feature_indices[layer, place])) for layer, place in zip(layers, places, strict=True)}
