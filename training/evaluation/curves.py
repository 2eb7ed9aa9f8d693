"""Insertion and deletion: are the nodes that an account names those that make the prediction?

The nodes of each image (`training.evaluation.nodes`: features of a CLT, `training.evaluation.residual_nodes`: features
of residual SAEs) are ranked and tried in the running network, where a node is taken away by setting it to its usual
value, a mean or a median over images:

    deletion     the best-ranked nodes are set to their usual values, all others stay
    insertion    all nodes are set to their usual values but the best-ranked

A faithful ranking's deletion curve falls at once, its insertion curve rises at once. They are measured at FRACTIONS of
the image's active nodes (arXiv 2509.17401) and, for deletion, at NODES of them. Of each run: the logit of the image's
own top-1, the same less the mean logit of all labels, its probability, and whether it still is the top-1.

The curve of the logit less the mean is stated as a share of its value with nothing taken away: the mean over images of
both, divided. Its area is the mean of the curve over the fractions as they are listed, by the trapezoid rule on equally
spaced points: a low area is good for deletion, a high one for insertion. Regained is how much of the way from
everything taken away to nothing taken away the insertion of REGAINED of the nodes goes.

n images, R runs of an image, M measured numbers, N nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from rich.console import Console
from torch import Tensor

from vitrine.models.bootstrap import Array, Bootstrap, Estimate
from vitrine.models.clip.loading import Clip
from vitrine.models.progress import Progress
from vitrine.training.data.held_out import HeldOut
from vitrine.training.evaluation.nodes import Nodes
from vitrine.training.evaluation.results import NodeCurve, NodeFaithfulness, NodePoint

FRACTIONS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
REGAINED = 0.02  # of FRACTIONS
NODES = 100  # deletion is measured at this number of nodes, too
AT_ONCE = 16  # runs
LOGIT, ABOVE_MEAN, PROBABILITY, STAYS = range(4)  # the numbers measured
WAYS = ("deletion", "insertion")


class Curves:
    """Measures the images it is given, one at a time.

    Args:
        clip: in evaluation mode.
        label_embeddings: [labels, D].
        kinds: of nodes, on the CLIP's device; each with rankings of its own.
    """

    def __init__(self, clip: Clip, label_embeddings: Tensor, kinds: Sequence[Nodes]) -> None:
        self.clip, self.tower, self.kinds = clip, clip.tower, kinds
        self.labels = label_embeddings.to(clip.tower.visual.proj)
        self._values: dict[str, list[Tensor]] = {}  # by ranking, of each image [ways, levels, M]
        self._nodes: dict[str, list[Tensor]] = {}  # [M]
        self._active: dict[str, list[int]] = {}
        self._own: list[Tensor] = []  # [M] with nothing taken away

    @property
    def images(self) -> int:
        """How many were measured."""
        return len(self._own)

    def update(self, pixels: Tensor) -> None:
        """One image, normalised pixels [1, 3, H, W]."""
        with torch.no_grad():
            embedded = self.tower.embed(pixels)
            own = self._logits(self.tower(pixels).residual_out[:, 0])  # [1, labels]
        top1 = int(own.argmax())
        for kind in self.kinds:
            self._measure_kind(kind, pixels, embedded, top1)
        self._own.append(_measure(own, top1)[0].cpu())

    def _measure_kind(self, kind: Nodes, pixels: Tensor, embedded: Tensor, top1: int) -> None:
        """All rankings of one kind of nodes in one image."""
        scores, active, everything = kind.ranked(pixels, self.labels[top1] - self.labels.mean(0))
        count = int(active.sum())
        counts = [round(fraction * count) for fraction in FRACTIONS[1:-1]]

        def edits() -> Iterator[Tensor]:
            yield everything & False  # these two are of all rankings: nothing is taken away, everything is
            yield everything
            for of_nodes in scores.values():
                order = of_nodes.masked_fill(~active, -torch.inf).argsort(descending=True, stable=True)
                rank = torch.empty_like(order)
                rank[order] = torch.arange(len(order), device=order.device)
                yield from (rank < number for number in counts)
                yield from (everything & (rank >= number) for number in counts)
                yield rank < min(NODES, count)

        measured = torch.cat([self._run(kind, embedded, torch.stack(part), top1) for part in _batched(edits())])
        ends, rest = measured[:2].cpu(), measured[2:].unflatten(0, (len(scores), -1)).cpu()
        nothing, everything_away = ends[:1], ends[1:]
        for name, runs in zip(scores, rest, strict=True):
            deletion = torch.cat([nothing, runs[: len(counts)], everything_away])
            insertion = torch.cat([everything_away, runs[len(counts) : -1], nothing])
            self._values.setdefault(name, []).append(torch.stack([deletion, insertion]))
            self._nodes.setdefault(name, []).append(runs[-1])
            self._active.setdefault(name, []).append(count)

    def figures(self, seed: int = 0) -> NodeFaithfulness:
        """All curves, with intervals over the images."""
        bootstrap = Bootstrap(self.images, seed=seed)
        whole = torch.stack(self._own).double().numpy()[:, ABOVE_MEAN]

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

        def regained(insertion: Array) -> Estimate:
            """insertion: [n, levels]."""
            way = insertion[:, [FRACTIONS.index(REGAINED), -1]] - insertion[:, :1]  # [n, 2]
            samples, mean = bootstrap.means(way), way.mean(0)
            return bootstrap.interval(float(mean[0] / mean[1]), samples[:, 0] / samples[:, 1])

        curves = []
        for name, of_images in self._values.items():
            deletion, insertion = torch.stack(of_images).double().numpy().swapaxes(0, 1)
            at_nodes = torch.stack(self._nodes[name]).double().numpy()[:, None]
            areas = [share(_areas(curve[..., ABOVE_MEAN])) for curve in (deletion, insertion)]
            curves.append(
                NodeCurve(
                    ranking=name,
                    active=sum(self._active[name]) / self.images,
                    deletion=points(deletion),
                    insertion=points(insertion),
                    deletion_area=areas[0],
                    insertion_area=areas[1],
                    regained=regained(insertion[..., ABOVE_MEAN]),
                    at_nodes=points(at_nodes)[0],
                )
            )
        return NodeFaithfulness(
            images=self.images,
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
    def _run(self, kind: Nodes, embedded: Tensor, edited: Tensor, top1: int) -> Tensor:
        """One image edited in R ways [R, N]: [R, M]."""
        return _measure(self._logits(kind.run(embedded.expand(len(edited), -1, -1), edited)), top1)

    def _logits(self, residual: Tensor) -> Tensor:
        embedding = torch.nn.functional.normalize(self.tower.head(residual), dim=-1)
        return self.clip.logit_scale * embedding @ self.labels.T


def node_faithfulness(
    clip: Clip,
    kinds: Sequence[Nodes],
    images: HeldOut,
    label_embeddings: Tensor,
    count: int,
    console: Console,
    *,
    seed: int = 0,
) -> NodeFaithfulness | None:
    """Curves over the first `count` images that CLIP classifies rightly, in an order by `seed`; over any, where that is
    not known. None: there are no such images."""
    curves = Curves(clip, label_embeddings, kinds)
    with Progress(console) as progress:
        task = progress.task("insertion and deletion", count, "images")
        for pixels in rightly_classified(curves.top1, images, count, clip.tower.visual.proj.device, seed):
            curves.update(pixels)
            task.advance(1)
    return curves.figures(seed) if curves.images else None


def rightly_classified(
    top1: Callable[[Tensor], int], images: HeldOut, count: int, device: torch.device, seed: int
) -> Iterator[Tensor]:
    """Pixels [1, 3, H, W] of at most `count` images whose top-1 is right, or not known to be wrong."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = replace(images, indices=tuple(images.indices[position] for position in order), batch_size=1)
    found = 0
    for pixels, truth in shuffled.batches():
        if found == count:
            return
        pixels = pixels.to(device)  # none of an image that cannot be read
        if len(pixels) and int(truth) in (top1(pixels), -1):
            found += 1
            yield pixels


def _batched(runs: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    while part := list(islice(runs, AT_ONCE)):
        yield part


def _measure(logits: Tensor, top1: int) -> Tensor:
    """Logits [R, labels] -> the measured numbers [R, M]."""
    of_top1 = logits[:, top1]
    shares = logits.softmax(-1)[:, top1]
    stays = (logits.argmax(-1) == top1).to(logits)
    return torch.stack([of_top1, of_top1 - logits.mean(-1), shares, stays], dim=-1)


def _areas(curves: Array) -> Array:
    """Curves [n, levels] -> their means by the trapezoid rule, the levels equally spaced [n]."""
    return (curves[:, 1:] + curves[:, :-1]).mean(1) / 2
