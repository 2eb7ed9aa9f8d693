"""What the graphs of interventions are by the manifest, as `service.engine.fit` has it of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrine.models.bundle.layout import COMPONENTS, RERUN, RERUN_INPUTS
from vitrine.models.bundle.manifest import Manifest
from vitrine.service.engine.fit import Dimensions, Graph, accounts, of_pixels


def rerun_graph(manifest: Manifest, file: str) -> Graph:
    """The graph, for one changed feature in its outputs."""
    shape = manifest.shape
    layers, tokens, rows = shape.layers, shape.tokens, 2 * shape.layers + 4
    numbers: tuple[Dimensions, ...] = (
        *((None,), (None,), (None, None, tokens), (None, None, tokens)),
        *((None,), (None, shape.width), (None, None, tokens), (None, None, tokens)),
        *((None, layers, shape.heads, tokens), (None, layers, tokens), (None, layers, tokens)),
    )
    inputs = of_pixels(manifest)
    for name, dimensions in zip(RERUN_INPUTS, numbers, strict=True):
        whole = name in ("layers", "indices", "places")
        inputs[name] = ("tensor(int64)" if whole else "tensor(float)", dimensions)
    places = shape.k + (file == RERUN)  # changed features of the CLT are listed besides
    outputs = accounts(manifest, rows, places) | {COMPONENTS: (None, rows, shape.width)}
    return Graph(file, inputs, outputs, shape.features)


def rerun_feeds(manifest: Manifest) -> dict[str, NDArray[Any]]:
    """One image of noise, of which one feature and one direction are changed."""
    shape = manifest.shape
    one, tokens = np.ones((1, 1, shape.tokens), np.float32), np.ones((1, shape.layers, shape.tokens), np.float32)
    direction = np.full((1, shape.width), shape.width**-0.5, np.float32)
    none = np.zeros(1, np.int64)
    heads = np.ones((1, shape.layers, shape.heads or 1, shape.tokens), np.float32)
    changed = (none, none, one, one, none + shape.layers, direction, -one, 0 * one, heads, tokens, tokens)
    noise = np.random.default_rng(0).standard_normal((1, 3, *manifest.preprocessing.size)).astype(np.float32)
    return {"pixels": noise} | dict(zip(RERUN_INPUTS, changed, strict=True))
