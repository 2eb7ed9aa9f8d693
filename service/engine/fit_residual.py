"""What the graphs of residual SAEs are by the manifest, as `service.engine.fit` has it of the others."""

from __future__ import annotations

from vitrine.models.bundle.layout import RESIDUAL_HELD, RESIDUAL_TRACE, residual_file
from vitrine.models.bundle.manifest import Manifest
from vitrine.service.engine.fit import Dimensions, Graph, held_fast, of_pixels

FIELD = "max(residual.features)"


def residual_trace_graph(manifest: Manifest) -> Graph:
    """The trace with the SAEs' codes."""
    shape = manifest.shape
    layers, tokens, saes = shape.layers, shape.tokens, shape.layers - 1
    outputs = held_fast(manifest) | {
        "gates": (None, layers, tokens, None),
        "streams": (None, layers, tokens, shape.width),
        "deviations": (None, saes, tokens),
        "indices": (None, saes, tokens, None),
        "values": (None, saes, tokens, None),
    }
    return Graph(RESIDUAL_TRACE, of_pixels(manifest), outputs, _features(manifest), FIELD)


def residual_block_graph(manifest: Manifest, block: int, heads: int, neurons: int) -> Graph:
    """The graph that goes back through a block. heads, neurons: as the trace has them, the manifest does not say."""
    shape = manifest.shape
    tokens, width = shape.tokens, shape.width
    inputs: dict[str, tuple[str, Dimensions]] = {"direction": ("tensor(float)", (None, width))}
    if block < shape.layers - 1:
        inputs = dict.fromkeys(("feature", "token"), ("tensor(int64)", (None,)))
        inputs["scales"] = ("tensor(float)", (tokens,))
    held: tuple[Dimensions, ...] = (
        *((heads, tokens, tokens), (tokens,), (tokens,), (tokens, neurons), (tokens, width)),
        *((tokens,), (tokens, None), (tokens, None)),
    )
    kinds = {name: ("tensor(float)", dimensions) for name, dimensions in zip(RESIDUAL_HELD, held, strict=True)}
    kinds["indices"] = ("tensor(int64)", (tokens, None))
    outputs: dict[str, Dimensions] = {"constant": (None,)}
    if block:
        outputs |= {"features": (None, tokens, None), "errors": (None, tokens), "bias": (None,)}
    else:
        outputs["embeddings"] = (None, tokens)
        for name in RESIDUAL_HELD[-3:]:  # there is no SAE below
            del kinds[name]
    return Graph(residual_file(block), inputs | kinds, outputs, _features(manifest), FIELD)


def _features(manifest: Manifest) -> int:
    return max(manifest.residual.features) if manifest.residual else 0
