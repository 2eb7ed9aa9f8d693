"""Two passes over held-out images, shared by all measurements.

The first pass computes what the second needs: mean MLP outputs, mean codes, and the contribution scores onto the last
layer, by which source layers are ranked. The second measures the rest. Only sums and a few numbers per image are kept
(and the codes at [CLS], for retrieval), never activations.

L layers, B images, T tokens, N = B * T tokens of a batch, S source layers of a target, F features, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from vitrine.models.account.windows import TOKENS, Tokens
from vitrine.models.clip.loading import Clip
from vitrine.models.clip.tower import Taps
from vitrine.models.dictionary.clt import CrossLayerTranscoder, SortedCode
from vitrine.models.dictionary.replacement import Precomputed, Replacement
from vitrine.models.dictionary.sparsify import Code
from vitrine.training.data.activations import activations
from vitrine.training.data.held_out import HeldOut
from vitrine.training.evaluation.cascades import Cascades
from vitrine.training.evaluation.contributions import (
    CLS,
    PATCHES,
    ScoreMean,
    add_codes,
    by_type,
    centred,
    mean_contributions,
)
from vitrine.training.evaluation.faithfulness import RANKINGS, Interventions, ranked
from vitrine.training.evaluation.reconstruction import Reconstruction
from vitrine.training.evaluation.retrieval import Gallery


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


class _Batch(NamedTuple):
    pixels: Tensor  # [B, 3, H, W]
    truth: Tensor  # [B] label indices, -1: unknown
    taps: Taps
    codes: list[SortedCode]  # [L], each [N, K]
    is_cls: Tensor  # [N]


class _FirstPass(NamedTuple):
    output_means: Tensor  # [3, L, d] over all tokens, [CLS], patches
    code_means: Tensor  # [2, L, F] over [CLS], patches
    onto_last: ScoreMean


@torch.no_grad()
def measure(
    clip: Clip,
    clt: CrossLayerTranscoder,
    images: HeldOut,
    label_embeddings: Tensor,
    plan: Plan,
    console: Console,
    *,
    seed: int = 0,
) -> Measurements:
    """Run both passes for one CLT, which must be on the CLIP's device; label embeddings [labels, D].

    Without labels nothing is predicted: cascades and interventions stay empty.
    """
    tower, last = clip.tower, clt.layers - 1
    label_embeddings = label_embeddings.to(clt.decoders[0].bias)

    def classify(residual: Tensor) -> Tensor:
        embedding = torch.nn.functional.normalize(tower.head(residual), dim=-1)
        return (clip.logit_scale * embedding @ label_embeddings.T).log_softmax(-1)

    with _progress(console) as progress:
        first_pass = _first_pass(clip, clt, images, progress)
        means = mean_contributions(clt, first_pass.code_means) if plan.matrices else []
        rankings = {kind: ranked(first_pass.onto_last.matrix(kind)[last]) for kind in RANKINGS}
        measured = Measurements(
            Reconstruction(clt, first_pass.output_means),
            Cascades(Replacement(tower, clt), classify, plan.windows, plan.tokens),
            Interventions(classify, clt.decoders[last].bias, rankings, plan.random_orders, seed),
            ScoreMean(clt.layers),
            ScoreMean(clt.layers),
            Gallery(clt.layers, clt.features),
        )
        for batch in _batches(clip, clt, images, progress, "measure"):
            taps, shape = batch.taps, batch.taps.mlp_out.shape[1:]
            decoded = []
            for target, decoder in enumerate(clt.decoders):
                parts = decoder.contributions(batch.codes)  # [S, N, d]
                decoded.append((decoder.bias + parts.sum(0)).view(shape))
                if plan.matrices:
                    measured.raw.update(target, decoder.sources, parts, batch.is_cls)
                    centred_parts = centred(parts, means[target], batch.is_cls)
                    measured.centred.update(target, decoder.sources, centred_parts, batch.is_cls)
            measured.reconstruction.update(taps.mlp_out, torch.stack(decoded), batch.codes)

            cls_parts = parts.new_zeros(clt.layers, len(batch.pixels), clt.width)
            cls_parts[clt.decoders[last].sources] = parts[:, batch.is_cls]
            before = taps.residual_out[:, 0] - taps.mlp_out[last, :, 0]
            if images.labels:
                own = classify(taps.residual_out[:, 0])
                measured.interventions.update(before, cls_parts, own, batch.truth)
                measured.cascades.update(batch.pixels, Precomputed(taps, batch.codes), own, batch.truth)
            if plan.retrieval and images.has_classes:
                selected = [(code.indices[batch.is_cls], code.values[batch.is_cls]) for code in batch.codes]
                at_cls = [Code(indices, values) for indices, values in selected]
                measured.gallery.update(at_cls, tower.head(taps.residual_out[:, 0]), batch.truth)
    return measured


def _first_pass(clip: Clip, clt: CrossLayerTranscoder, images: HeldOut, progress: Progress) -> _FirstPass:
    """Means and rankings for the second pass."""
    last, decoder = clt.layers - 1, clt.decoders[-1]
    outputs = torch.zeros(2, clt.layers, clt.width, dtype=torch.float64)
    codes = torch.zeros(2, clt.layers, clt.features, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    onto_last = ScoreMean(clt.layers)
    for batch in _batches(clip, clt, images, progress, "survey"):
        counts += by_type(torch.ones_like(batch.is_cls), batch.is_cls)
        outputs[CLS] += batch.taps.mlp_out[:, :, 0].double().sum(1).cpu()
        outputs[PATCHES] += batch.taps.mlp_out[:, :, 1:].double().sum((1, 2)).cpu()
        add_codes(codes, batch.codes, batch.is_cls)
        onto_last.update(last, decoder.sources, decoder.contributions(batch.codes), batch.is_cls)
    by_kind = outputs / counts[:, None, None]
    overall = outputs.sum(0) / counts.sum()
    return _FirstPass(torch.stack([overall, *by_kind]), codes / counts[:, None, None], onto_last)


def _batches(clip: Clip, clt: CrossLayerTranscoder, images: HeldOut, progress: Progress, name: str) -> Iterator[_Batch]:
    """All batches of images, with CLIP's taps and the CLT's codes for them."""
    device = clt.decoders[0].bias.device
    task = progress.add_task(name, total=len(images))
    for pixels, truth in images.batches():
        pixels = pixels.to(device)
        taps = clip.tower(pixels)
        mlp_in, _, is_cls = activations(taps)
        yield _Batch(pixels, truth, taps, clt.encode(mlp_in, is_cls), is_cls)
        progress.advance(task, len(pixels))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )
