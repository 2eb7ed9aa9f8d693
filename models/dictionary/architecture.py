"""The shapes of dictionaries, without torch, so that a recipe is checked before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["relu_topk", "abs_topk", "jumprelu", "batch_topk"]


@dataclass(frozen=True)
class Architecture:
    """The shape of a CLT. k, k_cls: active features per token, one number per layer, for patches and for [CLS]."""

    layers: int
    width: int
    features: int
    k: tuple[int, ...]
    k_cls: tuple[int, ...]
    sparsifier: Kind = "relu_topk"
    cross_layer: bool = True

    def __post_init__(self) -> None:
        for name, budgets in (("k", self.k), ("k_cls", self.k_cls)):
            if len(budgets) != self.layers:
                raise ValueError(f"{name} has {len(budgets)} numbers for {self.layers} layers")

    def sources(self, target: int) -> range:
        """The source layers that write to a target layer."""
        return range(0 if self.cross_layer else target, target + 1)

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        pairs = sum(len(self.sources(target)) for target in range(self.layers))
        encoders = self.layers * self.features * (self.width + 1 + (self.sparsifier == "jumprelu"))
        return encoders + pairs * self.features * self.width + self.layers * self.width


@dataclass(frozen=True)
class SaeArchitecture:
    """The shape of a tower's residual SAEs: one number per SAE, of which there is one after every block but the last.

    k, k_cls: active features per token, for patches and for [CLS]. Raises `ValueError` unless all three have as many
    numbers.
    """

    width: int
    features: tuple[int, ...]
    k: tuple[int, ...]
    k_cls: tuple[int, ...]
    sparsifier: Kind = "relu_topk"

    def __post_init__(self) -> None:
        for name, budgets in (("k", self.k), ("k_cls", self.k_cls)):
            if len(budgets) != self.layers:
                raise ValueError(f"{name} has {len(budgets)} numbers for {self.layers} SAEs")

    @property
    def layers(self) -> int:
        """Number of SAEs: one less than the tower has blocks."""
        return len(self.features)

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        of_feature = 2 * self.width + 1 + (self.sparsifier == "jumprelu")
        return sum(self.features) * of_feature + self.layers * self.width
