"""Insertion and deletion: are the features that an account names those that make the prediction?

The features of each image are ranked (`training.evaluation.rankings`) and tried in the running network, where a feature
is taken away by setting it to its mean (`models.dictionary.edited`):

    deletion     the best-ranked features are set to their means, all others stay
    insertion    all active features are set to their means but the best-ranked

A faithful ranking's deletion curve falls at once, its insertion curve rises at once. They are measured at FRACTIONS of
the image's active features (arXiv 2509.17401) and, for deletion, at NODES of them. Of each run: the logit of the
image's own top-1, the same less the mean logit of all labels, its probability, and whether it still is the top-1.

The curve of the logit less the mean is stated as a share of its value with nothing taken away: the mean over images of
both, divided. Its area is the mean of the curve over the fractions as they are listed, by the trapezoid rule on equally
spaced points: a low area is good for deletion, a high one for insertion.

n images, R runs of an image, M measured numbers, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.console import Console
from torch import Tensor

from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.edited import Edited
from vitrine.models.progress import Progress
from vitrine.training.data.held_out import HeldOut
from vitrine.training.evaluation.bootstrap import Array, Bootstrap
from vitrine.training.evaluation.rankings import NODE_RANKINGS, Rankings
from vitrine.training.evaluation.results import Estimate, NodeCurve, NodeFaithfulness, NodePoint

FRACTIONS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
NODES = 100  # deletion is measured at this number of features, too
AT_ONCE = 16  # runs
LOGIT, ABOVE_MEAN, PROBABILITY, STAYS = range(4)  # the numbers measured
WAYS = ("deletion", "insertion")


class Curves:
    """Measures the images it is given, one at a time.

    Args:
        clip, clt: on the same device; the CLT on raw activations, in evaluation mode.
        label_embeddings: [labels, D].
        mean: mean activations [L, 2, F] at [CLS] and over patches.
        seed: of the random ranking.
    """

    def __init__(
        self, clip: Clip, clt: CrossLayerTranscoder, label_embeddings: Tensor, mean: Tensor, seed: int = 0
    ) -> None:
        self.clip, self.tower = clip, clip.tower
        mean = mean.to(clt.decoders[0].bias)
        self.labels = label_embeddings.to(mean)
        self.edited, self.rankings = Edited(self.tower, clt, mean), Rankings(clip, clt, mean, seed)
        self._values: list[Tensor] = []  # of each image [rankings, ways, levels, M]
        self._nodes: list[Tensor] = []  # [rankings, M]
        self._own: list[Tensor] = []  # [M] with nothing taken away
        self.active: list[int] = []

    def update(self, pixels: Tensor) -> None:
        """One image, normalised pixels [1, 3, H, W]."""
        with torch.no_grad():
            embedded = self.tower.embed(pixels)
            own = self._logits(self.tower(pixels).residual_out[:, 0])  # [1, labels]
        top1 = int(own.argmax())
        scores, active = self.rankings(pixels, self.labels[top1] - self.labels.mean(0))
        count, flat = int(active.sum()), active.flatten()
        counts = [round(fraction * count) for fraction in FRACTIONS]
        runs = [active & False, active]  # those of all rankings: nothing is taken away, everything is
        for name in NODE_RANKINGS:
            order = scores[name].flatten().masked_fill(~flat, -torch.inf).argsort(descending=True, stable=True)
            rank = torch.empty_like(order)
            rank[order] = torch.arange(len(order), device=order.device)
            rank = rank.view_as(active)
            runs += [rank < number for number in counts[1:-1]]
            runs += [active & (rank >= number) for number in counts[1:-1]]
            runs.append(rank < min(NODES, count))
        measured = torch.cat([self._run(embedded, torch.stack(part), top1) for part in _split(runs)])
        nothing, everything, rest = measured[0], measured[1], measured[2:].unflatten(0, (len(NODE_RANKINGS), -1))
        inner = len(FRACTIONS) - 2
        ends = nothing.expand(len(rest), 1, -1), everything.expand(len(rest), 1, -1)
        deletion = torch.cat([ends[0], rest[:, :inner], ends[1]], dim=1)
        insertion = torch.cat([ends[1], rest[:, inner : 2 * inner], ends[0]], dim=1)
        self._values.append(torch.stack([deletion, insertion], dim=1).cpu())
        self._nodes.append(rest[:, -1].cpu())
        self._own.append(_measure(own, top1)[0].cpu())
        self.active.append(count)

    def figures(self, seed: int = 0) -> NodeFaithfulness:
        """All curves, with intervals over the images."""
        bootstrap = Bootstrap(len(self.active), seed=seed)
        values, nodes, own = (torch.stack(parts).double().numpy() for parts in (self._values, self._nodes, self._own))
        whole = own[:, ABOVE_MEAN]

        def share(of: Array) -> Estimate:
            """The mean of [n] as a share of that with nothing taken away."""
            return bootstrap.interval(float(of.mean() / whole.mean()), bootstrap.means(of) / bootstrap.means(whole))

        def points(of: Array) -> list[NodePoint]:
            """of: [n, levels, M]."""
            return [
                NodePoint(
                    above_mean=share(of[:, level, ABOVE_MEAN]),
                    logit=float(of[:, level, LOGIT].mean()),
                    probability=float(of[:, level, PROBABILITY].mean()),
                    stays=float(of[:, level, STAYS].mean()),
                )
                for level in range(of.shape[1])
            ]

        curves = []
        for at, name in enumerate(NODE_RANKINGS):
            deletion, insertion = (values[:, at, way] for way in range(len(WAYS)))
            areas = [share(_areas(curve[..., ABOVE_MEAN])) for curve in (deletion, insertion)]
            curves.append(
                NodeCurve(
                    ranking=name,
                    deletion=points(deletion),
                    insertion=points(insertion),
                    deletion_area=areas[0],
                    insertion_area=areas[1],
                    at_nodes=points(nodes[:, at, None])[0],
                )
            )
        return NodeFaithfulness(
            images=len(self.active),
            active=sum(self.active) / len(self.active),
            fractions=list(FRACTIONS),
            nodes=NODES,
            above_mean=float(whole.mean()),
            curves=curves,
        )

    @torch.no_grad()
    def top1(self, pixels: Tensor) -> int:
        """The label index of CLIP's own prediction for one image [1, 3, H, W]."""
        return int(self._logits(self.tower(pixels).residual_out[:, 0]).argmax())

    @torch.no_grad()
    def _run(self, embedded: Tensor, edited: Tensor, top1: int) -> Tensor:
        """One image edited in R ways [R, L, F]: [R, M]."""
        return _measure(self._logits(self.edited(embedded.expand(len(edited), -1, -1), edited)), top1)

    def _logits(self, residual: Tensor) -> Tensor:
        embedding = torch.nn.functional.normalize(self.tower.head(residual), dim=-1)
        return self.clip.logit_scale * embedding @ self.labels.T


def node_faithfulness(
    clip: Clip,
    clt: CrossLayerTranscoder,
    images: HeldOut,
    label_embeddings: Tensor,
    mean: Tensor,
    count: int,
    console: Console,
    *,
    seed: int = 0,
) -> NodeFaithfulness | None:
    """Curves over the first `count` images that CLIP classifies rightly, in an order by `seed`; over any, where that is
    not known. None: there are no such images."""
    curves = Curves(clip, clt, label_embeddings, mean, seed)
    device = clip.tower.visual.proj.device
    with Progress(console) as progress:
        task = progress.task("insertion and deletion", count, "images")
        for pixels in _right(curves, images, count, device, seed):
            curves.update(pixels)
            task.advance(1)
    return curves.figures(seed) if curves.active else None


def _right(curves: Curves, images: HeldOut, count: int, device: torch.device, seed: int) -> Iterator[Tensor]:
    """Pixels [1, 3, H, W] of images whose top-1 is right, or not known to be wrong."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = replace(images, indices=tuple(images.indices[position] for position in order), batch_size=1)
    for pixels, truth in shuffled.batches():
        if len(curves.active) == count:
            return
        pixels = pixels.to(device)  # none of an image that cannot be read
        if len(pixels) and int(truth) in (curves.top1(pixels), -1):
            yield pixels


def _split(runs: list[Tensor]) -> Iterator[list[Tensor]]:
    for at in range(0, len(runs), AT_ONCE):
        yield runs[at : at + AT_ONCE]


def _measure(logits: Tensor, top1: int) -> Tensor:
    """Logits [R, labels] -> the measured numbers [R, M]."""
    of_top1 = logits[:, top1]
    shares = logits.softmax(-1)[:, top1]
    stays = (logits.argmax(-1) == top1).to(logits)
    return torch.stack([of_top1, of_top1 - logits.mean(-1), shares, stays], dim=-1)


def _areas(curves: Array) -> Array:
    """Curves [n, levels] -> their means by the trapezoid rule, the levels equally spaced [n]."""
    return (curves[:, 1:] + curves[:, :-1]).mean(1) / 2
