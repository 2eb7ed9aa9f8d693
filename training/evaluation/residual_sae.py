"""How well residual SAEs stand in for the stream after the blocks, on held-out images (arXiv 2509.17401).

`evaluate_summary` runs at the end of training, `evaluate` implements `vitrine evaluate`. The modules are those of a
CLT's evaluation (`training.evaluation.evaluate`), with the stream after each block but the last as the target: as the
tokens are standardised, each by itself, which is what the SAEs are trained on, and raw, where longer tokens count for
more. R^2 is the fraction of variance explained. Beside them:

    relevance        of features, followed back              medians         usual values
    residual_nodes   that curves insert and delete           levels          what features answer to
    beside           a CLT on the same images                circuits        of single images, by either

L blocks, B images, T tokens, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from vitrine.models.account.windows import TOKENS, Tokens, paper_windows
from vitrine.models.bootstrap import Bootstrap
from vitrine.models.bundle.manifest import Metrics
from vitrine.models.clip.loading import Clip
from vitrine.models.clip.tower import Taps
from vitrine.models.dictionary.residual_replacement import ResidualReplacement, mixed
from vitrine.models.dictionary.residual_sae import ResidualSaes, standardise
from vitrine.models.dictionary.sparse_products import SortedCode
from vitrine.models.progress import Progress
from vitrine.training.checkpoint import check_clip, load_residual_saes, weights_file
from vitrine.training.data.activations import residual_streams
from vitrine.training.data.held_out import HeldOut
from vitrine.training.evaluation.beside import with_beside
from vitrine.training.evaluation.cascades import Cascades
from vitrine.training.evaluation.curves import node_faithfulness
from vitrine.training.evaluation.evaluate import circumstances, label_embeddings, open_checkpoint, summary
from vitrine.training.evaluation.levels import levels
from vitrine.training.evaluation.measure import AT_ONCE, classifier, sample, tapped
from vitrine.training.evaluation.medians import medians
from vitrine.training.evaluation.reconstruction import Reconstruction
from vitrine.training.evaluation.relevance import Medians
from vitrine.training.evaluation.residual_nodes import residual_nodes
from vitrine.training.evaluation.sae_results import SaeResults
from vitrine.training.evaluation.survey import Surveyor
from vitrine.training.recipes.recipe import ResidualSaeRecipe

MEDIAN_BYTES = 2**30  # kept on the host meanwhile


class Versions(NamedTuple):
    """The streams of some images after every block but the last, and the SAEs' versions of them."""

    own: Tensor  # [L - 1, B, T, d]
    replaced: Tensor  # [L - 1, B, T, d]


class ResidualReplaced:
    """[CLS] before ln_post [B, d] with the streams of a window replaced, of images whose `Versions` are known.

    Up to its first SAE a window is the tower itself; behind the last attention only [CLS] is followed.
    """

    def __init__(self, model: ResidualReplacement) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, known: Versions, window: range, tokens: Tokens) -> Tensor:
        model, first, last = self.model, window[0], self.model.tower.layers - 1
        stream = mixed(known.replaced[first], known.own[first], tokens)
        for layer in range(first + 1, last + 1):
            stream = model.block(layer, stream, cls_only=layer == last)
            if layer in window:
                _, stream = model.replace(layer, stream, tokens)
        return stream[:, 0]


@dataclass
class SaeMeasurements:
    """The measurements of the SAEs of one tower."""

    standardised: Reconstruction
    raw: Reconstruction
    singles: Cascades[Versions]  # one block alone, all tokens
    cascades: Cascades[Versions]  # windows up to the last SAE


@torch.inference_mode()
def measure(
    clip: Clip,
    saes: ResidualSaes,
    images: HeldOut,
    embeddings: Tensor,
    singles: list[range],
    windows: list[range],
    tokens: tuple[Tokens, ...],
    bootstrap: Bootstrap,
    console: Console,
) -> SaeMeasurements:
    """One pass over a sample of the images, one over all; SAEs on the CLIP's device, label embeddings [labels, D].

    Without labels nothing is predicted: `singles` and `cascades` stay empty.
    """
    classify = classifier(clip, embeddings.to(saes.decoders[0].bias))
    replaced = ResidualReplaced(ResidualReplacement(clip.tower, saes))
    with Progress(console) as progress:
        surveyors = Surveyor(saes.layers, saes.width), Surveyor(saes.layers, saes.width)
        for taps, _ in tapped(clip, sample(images), progress, "survey"):
            streams = residual_streams(taps)
            surveyors[0].add(standardise(streams).x)
            surveyors[1].add(streams)
        standardised, raw = (Reconstruction(saes, surveyor.survey(), bootstrap) for surveyor in surveyors)
        one, several = Cascades(replaced, classify, singles, ("all",)), Cascades(replaced, classify, windows, tokens)
        for taps, truth in tapped(clip, images, progress, "measure"):
            codes, read, outputs, versions = _versions(saes, taps)
            standardised.update(read, outputs, codes)
            raw.update(versions.own, list(versions.replaced), codes)
            if images.labels:
                own = classify(taps.residual_out[:, 0])
                for replacements in (one, several):
                    if replacements.pairs:
                        replacements.update(versions, own, truth)
    return SaeMeasurements(standardised, raw, one, several)


def _versions(saes: ResidualSaes, taps: Taps) -> tuple[list[SortedCode], Tensor, list[Tensor], Versions]:
    """(codes of all tokens by SAE, standardised tokens [L - 1, B, T, d], the SAEs' versions of these, streams)."""
    streams = residual_streams(taps)
    tokens = standardise(streams)
    is_cls = torch.zeros(streams.shape[1:3], dtype=torch.bool, device=streams.device)
    is_cls[:, 0] = True
    codes, outputs = saes(tokens.x.flatten(1, 2), is_cls.flatten())
    outputs = outputs.view_as(streams)
    return codes, tokens.x, list(outputs), Versions(streams, tokens.undone(outputs))


def evaluate_summary(
    clip: Clip, saes: ResidualSaes, images: HeldOut, templates: tuple[str, ...], console: Console
) -> Metrics:
    """The figures stored in a checkpoint: of standardised tokens, and of predictions with every SAE in place.

    Args:
        clip, saes: on the same device; the SAEs in evaluation mode.
        images: as in `training.evaluation.evaluate.evaluate_summary`.
        templates: the recipe's.
    """
    embeddings = label_embeddings(clip, images, templates, console)
    bootstrap = Bootstrap(len(images), resamples=2)  # the intervals are not used
    measured = measure(clip, saes, images, embeddings, [], [range(saes.layers)], ("all", "cls"), bootstrap, console)
    baseline, cascades = measured.cascades.figures(bootstrap)
    return summary(measured.standardised.figures(), baseline, *(cascades or (None, None)))


def evaluate(
    clip: Clip,
    checkpoint: Path,
    images: HeldOut,
    console: Console,
    *,
    seed: int = 0,
    curves: int = 0,
    of_medians: HeldOut | None = None,
    beside: Path | None = None,
) -> SaeResults:
    """All figures for the SAEs of a checkpoint; curves: so many images have their nodes inserted and deleted
    (`training.evaluation.curves`), about the medians of the images `of_medians`; beside: the checkpoint of a CLT, which
    is measured on the same images.

    Raises `CheckpointError` if either was trained on another CLIP.
    """
    if beside:
        open_checkpoint(beside, clip)  # before all else is measured
    saes, meta = load_residual_saes(checkpoint)
    check_clip(checkpoint, meta, clip)
    assert isinstance(meta.recipe, ResidualSaeRecipe)  # load_residual_saes has seen to it
    embeddings = label_embeddings(clip, images, meta.recipe.data.templates, console)
    bootstrap, saes = Bootstrap(len(images), seed=seed), saes.to(clip.tower.visual.proj.device)
    singles, windows = [range(layer, layer + 1) for layer in range(saes.layers)], paper_windows(saes.layers)
    measured = measure(clip, saes, images, embeddings, singles, windows, TOKENS, bootstrap, console)
    baseline, cascades = measured.cascades.figures(bootstrap)
    nodes = None
    if curves and of_medians and images.labels:
        kinds = residual_nodes(clip, saes, medians_over(clip, saes, of_medians, console), seed)
        nodes = node_faithfulness(clip, kinds, images, embeddings, curves, console, seed=seed)
        nodes = nodes and nodes.model_copy(update={"medians": len(of_medians)})
    results = SaeResults(
        recipe=meta.recipe,
        **circumstances(clip, weights_file(checkpoint, meta), meta, images, bootstrap, seed),
        layers=saes.layers,
        reconstruction=measured.standardised.figures(),
        raw=measured.raw.figures(),
        baseline=baseline,
        singles=measured.singles.figures(bootstrap)[1],
        cascades=cascades,
        nodes=nodes,
        levels=levels(clip, saes, images, console, seed=seed, training_seed=meta.recipe.training.seed),
    )
    if beside:
        of_curves = of_medians if curves else None
        return with_beside(results, clip, saes, beside, images, embeddings, of_curves, curves, console)
    return results


def medians_over(clip: Clip, saes: ResidualSaes, images: HeldOut, console: Console) -> Medians:
    """The medians of `training.evaluation.medians` over some images, in as many passes as MEDIAN_BYTES asks for."""
    of_token = len(images) * saes.layers * (8 * saes.width + 12 * max(saes.architecture.k + saes.architecture.k_cls))
    at_once = min(clip.tower.tokens, max(1, MEDIAN_BYTES // of_token))
    passes = -(-clip.tower.tokens // at_once)
    with Progress(console) as progress:
        task = progress.task("medians", passes * len(images), "images")

        def batches() -> Iterator[Tensor]:
            for pixels, _ in images.batches():
                for few in pixels.split(AT_ONCE):
                    yield few
                    task.advance(len(few))

        return medians(clip.tower, saes, batches, at_once)
