"""The figures of arXiv 2604.13304 ("Can Cross-Layer Transcoders Replace Vision Transformer Activations?"), for
comparison. The paper's CLIPs, images and dictionaries differ, so these figures are a reference, not a target.

Faithfulness is from the paper's table. Accuracies under replacement and R^2 were read off its charts, to +-0.3 points
and +-0.003. Accuracies are in per cent.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitrine.models.account.windows import Tokens
from vitrine.models.dictionary.sparsify import Kind

LAYERS = 12


@dataclass(frozen=True)
class PaperCascade:
    """Zero-shot top-1, all tokens, by first replaced layer; all later layers are replaced too."""

    data: str
    clip: str
    baseline: float
    from_layer: dict[int, float]


CASCADES = (
    PaperCascade("CIFAR-100", "B/32", 61.65, {0: 51.1, 3: 54.8, 7: 62.1, 10: 61.2}),
    PaperCascade("CIFAR-100", "B/16", 66.0, {0: 58.8, 3: 60.8, 7: 65.6, 10: 66.0}),
    PaperCascade("COCO", "B/32", 43.12, {0: 39.1, 3: 41.3, 7: 43.1, 10: 43.1}),
    PaperCascade("ImageNet-100", "B/32", 80.42, {0: 68.8, 3: 75.3, 7: 80.4, 10: 80.6}),
    PaperCascade("ImageNet-100", "B/16", 84.3, {0: 81.2, 3: 82.7, 7: 84.3, 10: 84.3}),
)


@dataclass(frozen=True)
class PaperFaithfulness:
    """CLIP B/32: zero-shot top-1 with the last layer's best source layer dropped, and with only its best four kept."""

    data: str
    tokens: Tokens
    baseline: float
    drop_top1: float
    keep_top4: float


FAITHFULNESS = (
    PaperFaithfulness("CIFAR-100", "all", 61.65, 59.68, 59.96),
    PaperFaithfulness("CIFAR-100", "cls", 61.65, 59.91, 60.72),
    PaperFaithfulness("COCO", "all", 43.12, 42.98, 43.02),
    PaperFaithfulness("COCO", "cls", 43.12, 42.78, 43.00),
    PaperFaithfulness("ImageNet-100", "all", 80.42, 74.94, 80.56),
    PaperFaithfulness("ImageNet-100", "cls", 80.42, 74.86, 80.48),
)

# R^2, all tokens, over three data sets and two CLIPs: (lowest, highest).
R2: dict[Kind, tuple[float, float]] = {
    "jumprelu": (0.889, 0.954),
    "relu_topk": (0.899, 0.945),
    "abs_topk": (0.850, 0.920),
}

# C_{i->11}, source layers 0 to 11, CLIP B/32.
ONTO_LAST: dict[Tokens, tuple[float, ...]] = {
    "cls": (0.333, 0.104, 0.043, 0.065, 0.075, 0.051, 0.044, 0.020, 0.011, 0.002, 0.012, 0.240),
    "patches": (0.158, 0.082, 0.128, 0.103, 0.057, 0.029, 0.030, 0.063, 0.022, 0.012, 0.030, 0.287),
}


def cascade_change(layers: int, first: int, tokens: Tokens) -> tuple[float, float] | None:
    """Lowest and highest change in top-1 over the paper's cells, in points; None if the paper has no such window.

    For only [CLS] the paper states "within about 0.5 points of the baseline"; for patches "as all tokens".
    """
    if layers != LAYERS or first not in CASCADES[0].from_layer:
        return None
    if tokens == "cls":
        return -0.5, 0.5
    changes = [cell.from_layer[first] - cell.baseline for cell in CASCADES]
    return min(changes), max(changes)


def intervention_change(tokens: str, name: str) -> tuple[float, float] | None:
    """Lowest and highest change in top-1 by `drop_top1` or `keep_top4` over the paper's data sets, in points."""
    changes = [getattr(cell, name) - cell.baseline for cell in FAITHFULNESS if cell.tokens == tokens]
    return (min(changes), max(changes)) if changes else None
