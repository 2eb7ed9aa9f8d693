"""Four sparsifiers from the literature: from the pre-activations of one encoder to a sparse code.

Every sparsifier works in two steps, so that the cost of everything around it scales with K places per token, not F:

    select   which features may be active: at most K per token (no gradient)
    forward  the activations of those features, with the gradient that the sparsifier defines

A code therefore has K places per token; unused places hold activation 0. Budgets are per layer and, within a layer, per
token type: [CLS] may have a different budget from the patches.

N tokens, F features, K = `places`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vitrine.models.dictionary.architecture import Kind

_ROWS = 64  # tokens whose features are selected at a time


class Code(NamedTuple):
    """A sparse code: K places per token. Unused places have activation 0."""

    indices: Tensor  # [..., K] int64, feature
    values: Tensor  # [..., K] activation z


class Sparsifier(nn.Module):
    """Base class of the four. `k` and `k_cls`: active features per token, for patches and for [CLS]."""

    signed = False  # activations may be negative
    spare = 1  # places for each feature of the budget
    learns_from_silent_places = False  # places with activation 0 have a gradient

    def __init__(self, features: int, k: int, k_cls: int) -> None:
        super().__init__()
        if not 0 < min(k, k_cls) <= max(k, k_cls) <= features:
            raise ValueError(f"k = {k} and k_cls = {k_cls} must be between 1 and the number of features, {features}")
        self.features, self.budgets = features, (k, k_cls)
        self.widen(1.0)

    def widen(self, factor: float) -> None:
        """Use `factor` times the budgets, as training may do at the start."""
        self.k, self.k_cls = (min(self.features, round(factor * budget)) for budget in self.budgets)
        self.places = min(self.features, self.spare * max(self.k, self.k_cls))

    def select(self, preactivations: Tensor) -> Tensor:
        """[N, F] -> features [N, K], best first."""
        return _largest(preactivations, self.places)

    def forward(self, chosen: Tensor, indices: Tensor, is_cls: Tensor) -> Tensor:
        """Pre-activations of the selected features [N, K] -> activations [N, K]; is_cls [N] bool."""
        raise NotImplementedError

    def active(self, chosen: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        """Active features per token [N]; differentiable if the sparsifier learns this number."""
        return (values != 0).sum(-1).to(values.dtype)

    def inference_threshold(self, cls: bool = True) -> Tensor | None:
        """Outside training, for [CLS] or patches: the threshold of each pre-activation [F], 0 or more; None if features
        are chosen by rank."""
        return None

    def inference_places(self, cls: bool = True) -> int:
        """Number of places that [CLS] or a patch may use outside training."""
        if self.inference_threshold(cls) is not None:
            return self.places
        return self.k_cls if cls else self.k

    def _within_budget(self, values: Tensor, is_cls: Tensor) -> Tensor:
        """`values`, best first, with those beyond each token's budget set to 0."""
        if self.k == self.k_cls == self.places:
            return values
        budget = torch.where(is_cls, self.k_cls, self.k)[:, None]
        return values.where(torch.arange(self.places, device=values.device) < budget, 0.0)


class ReluTopK(Sparsifier):
    """The k largest pre-activations, with negative ones set to 0 (arXiv 2604.13304)."""

    def forward(self, chosen: Tensor, indices: Tensor, is_cls: Tensor) -> Tensor:
        return self._within_budget(chosen.relu(), is_cls)


class AbsTopK(Sparsifier):
    """The k largest pre-activations by magnitude, with their signs (arXiv 2604.13304)."""

    signed = True

    def select(self, preactivations: Tensor) -> Tensor:
        return super().select(preactivations.abs())

    def forward(self, chosen: Tensor, indices: Tensor, is_cls: Tensor) -> Tensor:
        return self._within_budget(chosen, is_cls)


class JumpReLU(Sparsifier):
    """z = a where a exceeds the feature's own threshold, else 0 (arXiv 2407.14435).

    `k` and `k_cls` are targets of the loss (`active`). Only the `places` pre-activations with the largest margin over
    their thresholds are considered, also in the served graph, so a token never has more active features than that.
    Both step functions pass a straight-through gradient to the threshold, a rectangle of width `bandwidth` around it.
    """

    spare = 2
    learns_from_silent_places = True  # from those just below their threshold
    bandwidth = 0.1  # pre-activations of normalised inputs are of order 1

    def __init__(self, features: int, k: int, k_cls: int) -> None:
        super().__init__(features, k, k_cls)
        self.log_threshold = nn.Parameter(torch.full((features,), 0.1).log())  # until `calibrate`

    @torch.no_grad()
    def calibrate(self, preactivations: Tensor) -> None:
        """Set every threshold so that on average k features per token are active on these tokens [N, F]."""
        kept = self.k * len(preactivations)
        smallest = preactivations.flatten().kthvalue(preactivations.numel() - kept + 1).values
        self.log_threshold.fill_(smallest.clamp_min(1e-3).log())

    def select(self, preactivations: Tensor) -> Tensor:
        return super().select(preactivations - self.log_threshold.exp())

    def forward(self, chosen: Tensor, indices: Tensor, is_cls: Tensor) -> Tensor:
        return _Jump.apply(chosen, self.log_threshold.exp()[indices], self.bandwidth)

    def active(self, chosen: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        """Active features per token [N], differentiable (straight-through) in the thresholds."""
        return _Step.apply(chosen, self.log_threshold.exp()[indices], self.bandwidth).sum(-1)

    def inference_threshold(self, cls: bool = True) -> Tensor:
        return self.log_threshold.detach().exp()


class BatchTopK(Sparsifier):
    """In training, the k * N largest of a batch of N tokens, regardless of token (arXiv 2412.06410).

    A running mean of the smallest kept activation is tracked, one for patches and one for [CLS]. Outside training it is
    the threshold of a JumpReLU, so a prediction never depends on the other images of its batch. No token gets more than
    `places`, in training or outside.
    """

    spare = 2
    momentum = 0.99
    thresholds: Tensor  # [2]: patches, [CLS]

    def __init__(self, features: int, k: int, k_cls: int) -> None:
        super().__init__(features, k, k_cls)
        self.register_buffer("thresholds", torch.full((2,), -1.0))  # negative: not yet measured, no threshold applies

    def forward(self, chosen: Tensor, indices: Tensor, is_cls: Tensor) -> Tensor:
        positive = chosen.relu()
        if self.training:
            kept = torch.empty_like(positive, dtype=torch.bool)
            kept[~is_cls] = self._keep(positive[~is_cls], self.k, 0)
            kept[is_cls] = self._keep(positive[is_cls], self.k_cls, 1)
        else:
            kept = positive > self.thresholds[is_cls.long()][:, None]
        return positive.where(kept, 0.0)

    def inference_threshold(self, cls: bool = True) -> Tensor:
        return self.thresholds[int(cls)].clamp_min(0).expand(self.features)

    @torch.no_grad()
    def _keep(self, values: Tensor, k: int, token_type: int) -> Tensor:
        """Mask of the k * N largest of values [N, K]; exactly that many even if values tie at the cut-off."""
        kept = torch.zeros_like(values, dtype=torch.bool)
        if len(values):
            largest, places = values.flatten().topk(min(values.numel(), k * len(values)), sorted=False)
            kept.view(-1)[places] = True
            smallest, mean = largest.min(), self.thresholds[token_type]
            mean.copy_(torch.where(mean < 0, smallest, mean.lerp(smallest, 1 - self.momentum)))
        return kept


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row of values [N, F], best first: [N, count].

    On the CPU numpy's vectorised selection takes half the time of torch's, which is a third of a small CLT's step. Rows
    are selected a few at a time, so that numpy's order of all F of them stays in the processor's cache, by as many
    threads as torch has.
    """
    if not values.is_cpu or count == values.shape[-1]:
        return values.topk(count, dim=-1).indices
    rows = values.detach().numpy()
    chosen = np.empty((len(rows), count), np.int64)

    def select(start: int) -> None:
        few = slice(start, start + _ROWS)
        chosen[few] = np.argpartition(rows[few], -count, axis=-1)[:, -count:]

    starts = range(0, len(rows), _ROWS)
    if len(starts) > 1 and torch.get_num_threads() > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy lets go of the interpreter meanwhile
            list(pool.map(select, starts))
    else:
        for start in starts:
            select(start)
    indices = torch.from_numpy(chosen)
    return indices.gather(-1, values.gather(-1, indices).argsort(dim=-1, descending=True))


def make_sparsifier(kind: Kind, features: int, k: int, k_cls: int) -> Sparsifier:
    """Create the sparsifier of the given kind."""
    kinds: dict[Kind, type[Any]] = {
        "relu_topk": ReluTopK,
        "abs_topk": AbsTopK,
        "jumprelu": JumpReLU,
        "batch_topk": BatchTopK,
    }
    return kinds[kind](features, k, k_cls)


class _Jump(torch.autograd.Function):
    """a * H(a - t); d/dt = -t / width inside the rectangle (arXiv 2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(values, threshold)
        ctx.width = width
        return values * (values > threshold)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        values, threshold = ctx.saved_tensors
        near = ((values - threshold).abs() < ctx.width / 2).to(d_out.dtype)
        return d_out * (values > threshold), -threshold / ctx.width * near * d_out, None


class _Step(torch.autograd.Function):
    """H(a - t); d/dt = -1 / width inside the rectangle, no gradient to a (arXiv 2407.14435, eq. 12)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(values, threshold)
        ctx.width = width
        return (values > threshold).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, Tensor, None]:
        values, threshold = ctx.saved_tensors
        near = ((values - threshold).abs() < ctx.width / 2).to(d_out.dtype)
        return None, -near / ctx.width * d_out, None
