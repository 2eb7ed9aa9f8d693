"""CLIP's predictions under cascaded replacement, window by window (`models.account.windows`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from vitrine.models.account.windows import TOKENS, Tokens
from vitrine.models.bootstrap import Bootstrap, Estimate
from vitrine.training.evaluation.results import Cascade, if_known

Known = TypeVar("Known")  # what a replacement model is told of some images, to save work


def divergence(own: Tensor, replaced: Tensor) -> Tensor:
    """Kullback-Leibler divergence of `replaced` from `own`, log-probabilities [..., labels]: [...] in nats, float64."""
    return (own.exp() * (own - replaced)).sum(-1, dtype=torch.float64)


def is_right(predicted: Tensor, truth: Tensor) -> Tensor:
    """1 where the predicted label is the true one, else 0: float64; NaN where that is not known (truth -1)."""
    return (predicted == truth).double().masked_fill(truth < 0, torch.nan)


class Cascades(Generic[Known]):
    """Collects the predictions of CLIP and of its replacement models.

    Args:
        replaced: the [CLS] residuals [B, d] of the replacement model.
        classify: maps [CLS] residuals [..., d] to log-probabilities of the labels [..., labels].
        windows, tokens: every combination is measured.
    """

    def __init__(
        self,
        replaced: Callable[[Known, range, Tokens], Tensor],
        classify: Callable[[Tensor], Tensor],
        windows: list[range],
        tokens: tuple[Tokens, ...] = TOKENS,
    ) -> None:
        self.replaced, self.classify = replaced, classify
        self.pairs: list[tuple[range, Tokens]] = [(window, kind) for window in windows for kind in tokens]
        self._own: list[Tensor] = []
        self._replaced: list[Tensor] = []
        self._truth: list[Tensor] = []
        self._divergence: list[Tensor] = []

    def update(self, known: Known, own: Tensor, truth: Tensor) -> None:
        """What is known of B images, CLIP's log-probabilities for them [B, labels], label indices [B] (-1: unknown)."""
        runs = [self.replaced(known, window, tokens) for window, tokens in self.pairs]
        replaced = self.classify(torch.stack(runs, dim=1))  # [B, pairs, labels]
        self._own.append(own.argmax(-1).cpu())
        self._replaced.append(replaced.argmax(-1).cpu())
        self._divergence.append(divergence(own[:, None], replaced).cpu())
        self._truth.append(truth.cpu())

    @property
    def clip_right(self) -> Tensor:
        """Whether CLIP's own prediction is right [n], as of `is_right`."""
        return is_right(torch.cat(self._own), torch.cat(self._truth))

    @property
    def right(self) -> Tensor:
        """Whether each replacement model's prediction is right [n, pairs], as of `is_right`."""
        return is_right(torch.cat(self._replaced), torch.cat(self._truth)[:, None])

    def figures(self, bootstrap: Bootstrap) -> tuple[Estimate | None, list[Cascade]]:
        """CLIP's own top-1, and the figures of every (window, tokens) pair."""
        if not self._own:  # no labels
            return None, []
        right, own = self.right, self.clip_right
        agrees = (torch.cat(self._replaced) == torch.cat(self._own)[:, None]).double()
        top1, agreement = bootstrap.estimates(right.numpy()), bootstrap.estimates(agrees.numpy())
        diverges = bootstrap.estimates(torch.cat(self._divergence).numpy())
        difference = bootstrap.estimates((right - own[:, None]).numpy())
        cascades = [
            Cascade(
                first=window[0],
                last=window[-1],
                tokens=tokens,
                top1=if_known(top1[at]),
                difference=if_known(difference[at]),
                agreement=agreement[at],
                divergence=diverges[at],
            )
            for at, (window, tokens) in enumerate(self.pairs)
        ]
        return if_known(bootstrap.estimate(own.numpy())), cascades
