"""The passes over held-out images, shared by all measurements.

A survey, of the tower alone, over a sample of the images (`survey.py`); the measurement of all; and, for centred
contributions, which need the mean codes, a pass over the codes. Those of the first images are kept for it, up to
KEPT_BYTES, and those of the others computed again. Else only sums and a few numbers per token and image are kept (and
the codes at [CLS], for interventions and retrieval), never activations.

L layers, B images, T tokens, N = B * T tokens of a batch, S source layers of a target, F features, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from vitrine.models.account.windows import TOKENS, Tokens
from vitrine.models.bootstrap import Bootstrap
from vitrine.models.clip.loading import Clip
from vitrine.models.clip.tower import Taps
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.sparse_products import SortedCode
from vitrine.models.dictionary.sparsify import Code
from vitrine.models.progress import Progress
from vitrine.training.data.activations import Activations
from vitrine.training.data.held_out import HeldOut
from vitrine.training.evaluation.cascades import Cascades
from vitrine.training.evaluation.contributions import ScoreMean, add_codes, by_type, centre_, mean_contributions
from vitrine.training.evaluation.faithfulness import RANKINGS, Interventions, ranked
from vitrine.training.evaluation.reconstruction import Reconstruction
from vitrine.training.evaluation.replaced import Known, Replaced
from vitrine.training.evaluation.retrieval import Gallery
from vitrine.training.evaluation.survey import SAMPLE, Survey, Surveyor

KEPT_BYTES = 2**30  # of codes: 1,180 images of a ViT with 197 tokens and 12 layers, at k = 48
AT_ONCE = 16  # images: what is held of a batch of ViT-B/16 with 12 layers is 1 GB; more at once are no faster on a CPU


@dataclass(frozen=True)
class Plan:
    """What is measured in addition to reconstruction and the paper's two interventions."""

    windows: list[range]  # replaced layers
    tokens: tuple[Tokens, ...] = TOKENS  # tokens replaced in each window
    matrices: bool = False  # C_{i->j} onto every layer
    random_orders: int = 0
    retrieval: bool = False


@dataclass
class Measurements:
    """The measurements of one CLT."""

    reconstruction: Reconstruction
    cascades: Cascades
    interventions: Interventions
    raw: ScoreMean
    centred: ScoreMean
    gallery: Gallery
    mean_codes: Tensor | None  # [L, 2, F] at [CLS] and over patches; None: no matrices were planned


class _AtCls(NamedTuple):
    """What interventions need of B images, once the source layers are ranked."""

    before: Tensor  # [B, d] the stream at [CLS] before the last MLP
    own: Tensor  # [B, d] and after it
    codes: list[SortedCode]  # [L], each [B, K]
    truth: Tensor  # [B] label indices, -1: unknown


@torch.inference_mode()
def measure(
    clip: Clip,
    clt: CrossLayerTranscoder,
    images: HeldOut,
    label_embeddings: Tensor,
    plan: Plan,
    bootstrap: Bootstrap,
    console: Console,
    *,
    seed: int = 0,
) -> Measurements:
    """Run all passes for one CLT, which must be on the CLIP's device; label embeddings [labels, D].

    Without labels nothing is predicted: cascades and interventions stay empty.
    """
    tower, classify = clip.tower, classifier(clip, label_embeddings.to(clt.decoders[0].bias))
    with Progress(console) as progress:
        reconstruction = Reconstruction(clt, _survey(clip, clt, images, progress), bootstrap)
        cascades = Cascades(Replaced(tower, clt), classify, plan.windows, plan.tokens)
        gallery, raw, centred = Gallery(clt.layers, clt.features), ScoreMean(clt.layers), ScoreMean(clt.layers)
        starts = {window[0] for window in plan.windows}
        kept = _Codes(clt)
        at_cls: list[_AtCls] = []
        for taps, codes, is_cls, truth in _coded(clip, clt, images, progress, "measure"):
            known = Known(taps, codes)
            for target, decoder in enumerate(clt.decoders):
                parts = decoder.contributions(codes)  # [S, N, d]
                known.add(target, decoder.bias, decoder.sources, parts, starts)
                if plan.matrices or target == clt.layers - 1:
                    raw.update(target, decoder.sources, parts, is_cls)
            reconstruction.update(taps.mlp_out, known.decoded, codes)
            final = taps.residual_out[:, 0]
            selected = [
                code._replace(indices=code.indices[is_cls], values=code.values[is_cls], order=None) for code in codes
            ]
            if images.labels:
                cascades.update(known, classify(final), truth)
                at_cls.append(_AtCls(final - taps.mlp_out[-1, :, 0], final.clone(), selected, truth))
            if plan.matrices:
                kept.add(codes, is_cls)
            if plan.retrieval and images.has_classes:
                gallery.update([Code(code.indices, code.values) for code in selected], tower.head(final), truth)
        if plan.matrices:
            _centre(clip, clt, images, kept, centred, progress)
        interventions = _intervene(clt, classify, raw, at_cls, plan, seed)
    means = kept.means.transpose(0, 1).float() if plan.matrices else None
    return Measurements(reconstruction, cascades, interventions, raw, centred, gallery, means)


def classifier(clip: Clip, label_embeddings: Tensor) -> Callable[[Tensor], Tensor]:
    """[CLS] residuals [..., d] to log-probabilities of the labels [..., labels]."""

    def classify(residual: Tensor) -> Tensor:
        embedding = torch.nn.functional.normalize(clip.tower.head(residual), dim=-1)
        return (clip.logit_scale * embedding @ label_embeddings.T).log_softmax(-1)

    return classify


class _Codes:
    """The sums of all codes by feature, and the codes of the first batches."""

    def __init__(self, clt: CrossLayerTranscoder) -> None:
        self.sums = torch.zeros(2, clt.layers, clt.features, dtype=torch.float64)  # [CLS], patches
        self.counts = torch.zeros(2, dtype=torch.float64)  # tokens
        self.batches: list[tuple[list[SortedCode], Tensor]] = []  # codes [L] of [N, K], which tokens are [CLS] [N]
        self.images, self._bytes = 0, 0

    @property
    def means(self) -> Tensor:
        """[2, L, F]"""
        return self.sums / self.counts[:, None, None]

    def add(self, codes: list[SortedCode], is_cls: Tensor) -> None:
        add_codes(self.sums, codes, is_cls)
        self.counts += by_type(torch.ones_like(is_cls), is_cls)
        self._bytes += sum(8 * code.values.numel() for code in codes)
        if self._bytes <= KEPT_BYTES:
            smaller = [code._replace(indices=code.indices.int(), order=None) for code in codes]
            self.batches.append((smaller, is_cls))
            self.images += int(is_cls.sum())


def _survey(clip: Clip, clt: CrossLayerTranscoder, images: HeldOut, progress: Progress) -> Survey:
    """Of a sample of the images."""
    surveyor = Surveyor(clt.layers, clt.width)
    for taps, _ in tapped(clip, sample(images), progress, "survey"):
        surveyor.add(taps.mlp_out)
    return surveyor.survey()


def sample(images: HeldOut) -> HeldOut:
    """Those of a survey."""
    return replace(images, indices=images.indices[:: -(-len(images) // SAMPLE)])


def _centre(
    clip: Clip, clt: CrossLayerTranscoder, images: HeldOut, kept: _Codes, centred: ScoreMean, progress: Progress
) -> None:
    """Centred contribution scores, from the codes that were kept and those of the other images."""
    means = mean_contributions(clt, kept.means)
    task = progress.task("centred contributions", len(images), "images")
    others = replace(images, indices=images.indices[kept.images :])
    computed = _coded(clip, clt, others, progress, "second pass over the codes") if len(others) else ()
    for codes, is_cls in chain(kept.batches, ((codes, is_cls) for _, codes, is_cls, _ in computed)):
        for target, decoder in enumerate(clt.decoders):
            parts = decoder.contributions(codes)
            centred.update(target, decoder.sources, centre_(parts, means[target], is_cls), is_cls)
        task.advance(int(is_cls.sum()))


def _intervene(
    clt: CrossLayerTranscoder,
    classify: Callable[[Tensor], Tensor],
    raw: ScoreMean,
    at_cls: list[_AtCls],
    plan: Plan,
    seed: int,
) -> Interventions:
    """Source layers kept and dropped, ranked by `raw`."""
    last = clt.layers - 1
    decoder = clt.decoders[last]
    rankings = {kind: ranked(raw.matrix(kind)[last]) for kind in RANKINGS}
    interventions = Interventions(classify, decoder.bias, rankings, plan.random_orders, seed)
    for before, final, codes, truth in at_cls:
        parts = before.new_zeros(clt.layers, *before.shape)
        parts[decoder.sources] = decoder.contributions(codes)
        interventions.update(before, parts, classify(final), truth)
    return interventions


def _coded(
    clip: Clip, clt: CrossLayerTranscoder, images: HeldOut, progress: Progress, name: str
) -> Iterator[tuple[Taps, list[SortedCode], Tensor, Tensor]]:
    """Taps, codes [L] of [N, K], which tokens are [CLS] [N], and label indices [B] of all images."""
    for taps, truth in tapped(clip, images, progress, name):
        mlp_in, _, is_cls = Activations.of(taps)
        yield taps, clt.encode(mlp_in, is_cls), is_cls, truth


def tapped(clip: Clip, images: HeldOut, progress: Progress, name: str) -> Iterator[tuple[Taps, Tensor]]:
    """CLIP's taps and the label indices [B] of all images, a few at a time."""
    device, task = clip.tower.visual.proj.device, progress.task(name, len(images), "images")
    for pixels, truth in images.batches():
        for few, labels in zip(pixels.split(AT_ONCE), truth.split(AT_ONCE), strict=True):
            yield clip.tower(few.to(device)), labels
            task.advance(len(few))
