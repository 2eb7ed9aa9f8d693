"""How well a CLT stands in for the MLPs, on held-out images: the measurements of arXiv 2604.13304 and some more.

`evaluate` implements `vitrine evaluate` and returns all figures as `training.evaluation.results.Results`.
`evaluate_summary` runs at the end of training: the few figures stored in the checkpoint and the bundle. The modules:

    survey           means and usual lengths of MLP outputs       contributions   C_{i->j}
    reconstruction   MSE, R^2, cosine, L0, dead features          faithfulness    source layers kept and dropped
    cascades         zero-shot top-1 under replacement            retrieval       nearest images by sparse code
    replaced         the replacement models' residuals            bootstrap       intervals
    curves           insertion and deletion of features           rankings        of features, by several accounts
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from vitrine.models.account.windows import TOKENS, Tokens, paper_windows
from vitrine.models.bootstrap import Bootstrap
from vitrine.models.bundle.manifest import ClipIdentity, LayerMetrics, Metrics
from vitrine.models.bundle.sealing import file_sha256
from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.progress import track
from vitrine.training.checkpoint import CheckpointMeta, check_clip, clt_recipe, load_clt
from vitrine.training.data.held_out import HeldOut
from vitrine.training.evaluation.cascades import Cascades
from vitrine.training.evaluation.curves import node_faithfulness
from vitrine.training.evaluation.faithfulness import RANDOM_ORDERS, TOP
from vitrine.training.evaluation.measure import Measurements, Plan, measure
from vitrine.training.evaluation.nodes import CltNodes
from vitrine.training.evaluation.results import (
    Cascade,
    Comparison,
    Contributions,
    Estimate,
    Faithfulness,
    Results,
    Seeds,
    TokenFigures,
    if_known,
)
from vitrine.training.recipes.recipe import CltRecipe, Recipe

LEAST_CLS = 0.5  # R² at [CLS] below which a run and an export warn


def evaluate(
    clip: Clip,
    checkpoint: Path,
    images: HeldOut,
    console: Console,
    *,
    other: Path | None = None,
    seed: int = 0,
    curves: int = 0,
) -> Results:
    """All figures for the CLT of a checkpoint; `other`: a checkpoint to compare with, on the same images; curves: so
    many images have their features inserted and deleted (`training.evaluation.curves`).

    Raises `CheckpointError` if either was trained on another CLIP.
    """
    clt, meta = open_checkpoint(checkpoint, clip)
    compared = (other, *open_checkpoint(other, clip)) if other else None
    device = clip.tower.visual.proj.device
    windows = paper_windows(clt.layers)
    embeddings = label_embeddings(clip, images, meta.recipe.data.templates, console)
    plan = Plan(windows, matrices=True, random_orders=RANDOM_ORDERS, retrieval=True)
    bootstrap = Bootstrap(len(images), seed=seed)
    measured = measure(clip, clt.to(device), images, embeddings, plan, bootstrap, console, seed=seed)
    baseline, cascades = measured.cascades.figures(bootstrap)
    nodes = None
    if curves and images.labels:
        assert measured.mean_codes is not None  # the plan has matrices
        kinds = [CltNodes(clip, clt, measured.mean_codes, seed)]
        nodes = node_faithfulness(clip, kinds, images, embeddings, curves, console, seed=seed)
    comparison = None
    if compared:
        path, other_clt, _ = compared
        other_measured = measure(
            clip, other_clt.to(device), images, embeddings, Plan(windows), bootstrap, console, seed=seed
        )
        comparison = Comparison(
            name=path.resolve().parent.name,  # the run's folder: two runs of one recipe have one recipe's name
            checkpoint_sha256=file_sha256(path / "clt.safetensors"),
            cross_layer=other_clt.architecture.cross_layer,
            reconstruction=other_measured.reconstruction.figures(),
            cascades=other_measured.cascades.figures(bootstrap)[1],
            gains=_gains(measured.cascades, other_measured.cascades, bootstrap) if images.labels else [],
        )
    return Results(
        recipe=clt_recipe(checkpoint, meta),
        **circumstances(clip, checkpoint / "clt.safetensors", meta, images, bootstrap, seed),
        layers=clt.layers,
        reconstruction=measured.reconstruction.figures(),
        baseline=baseline,
        cascades=cascades,
        contributions={
            tokens: Contributions(
                raw=measured.raw.matrix(tokens).tolist(), centred=measured.centred.matrix(tokens).tolist()
            )
            for tokens in TOKENS
        },
        faithfulness=_faithfulness(measured, images, bootstrap),
        retrieval=measured.gallery.figures(images.labels, seed),
        comparison=comparison,
        nodes=nodes,
    )


def circumstances(
    clip: Clip, weights: Path, meta: CheckpointMeta, images: HeldOut, bootstrap: Bootstrap, seed: int
) -> dict[str, Any]:
    """The fields of `AnyResults` that say what was measured, and how; weights: the checkpoint's file."""
    return {
        "clip": ClipIdentity(name=clip.name, weights=clip.weights, sha256=clip.sha256),
        "checkpoint_sha256": file_sha256(weights),
        "step": meta.step,
        "images": len(images),
        "labels": list(images.labels),
        "left_out": images.left_out,
        "seeds": Seeds(sample=images.seed, bootstrap=seed, orders=seed),
        "resamples": bootstrap.resamples,
        "confidence": bootstrap.confidence,
    }


def evaluate_summary(
    clip: Clip, clt: CrossLayerTranscoder, images: HeldOut, templates: tuple[str, ...], console: Console
) -> Metrics:
    """The figures stored in a checkpoint and a bundle: two replacement models instead of twelve.

    Args:
        clip, clt: on the same device; the CLT on raw activations, in evaluation mode.
        images: `held_out(recipe.data, data_root, clip)`, or a sample of it: `held_out(..., images=1000)`.
        templates: the recipe's.
    """
    embeddings = label_embeddings(clip, images, templates, console)
    plan = Plan([range(clt.layers)], tokens=("all", "cls"))
    bootstrap = Bootstrap(len(images), resamples=2)  # the intervals are not used
    measured = measure(clip, clt, images, embeddings, plan, bootstrap, console)
    reconstruction = measured.reconstruction.figures()
    baseline, cascades = measured.cascades.figures(bootstrap)
    replaced_all, replaced_cls = cascades or (None, None)
    faithfulness = _faithfulness(measured, images, bootstrap)
    curve = faithfulness.curve("cls") if faithfulness else None
    return summary(reconstruction, baseline, replaced_all, replaced_cls).model_copy(
        update={
            "keep_top4_top1": curve.keep[min(TOP, clt.layers)].value if curve and curve.keep else None,
            "drop_top1_top1": curve.drop[1].value if curve and curve.drop else None,
        }
    )


def summary(
    reconstruction: dict[Tokens, TokenFigures],
    baseline: Estimate | None,
    replaced_all: Cascade | None,
    replaced_cls: Cascade | None,
) -> Metrics:
    """What a checkpoint keeps of these figures: CLIP's own top-1, and everything replaced for all tokens, or [CLS]."""
    everywhere, at_cls = reconstruction["all"], reconstruction["cls"]
    return Metrics(
        r2=everywhere.r2.value,
        r2_worst=everywhere.worst.r2,
        r2_kept=everywhere.r2_kept,
        r2_kept_worst=everywhere.worst.r2_kept,
        cosine=everywhere.cosine,
        relative_error=everywhere.relative_error,
        outliers=everywhere.outliers,
        r2_cls=at_cls.r2.value,
        r2_cls_worst=at_cls.worst.r2,
        relative_error_cls=at_cls.relative_error,
        dead_share=everywhere.dead_share,
        zero_shot_top1=baseline.value if baseline else None,
        replacement_all_top1=replaced_all.top1.value if replaced_all and replaced_all.top1 else None,
        replacement_all_agreement=replaced_all.agreement.value if replaced_all else None,
        replacement_cls_top1=replaced_cls.top1.value if replaced_cls and replaced_cls.top1 else None,
        replacement_cls_agreement=replaced_cls.agreement.value if replaced_cls else None,
        layers={
            tokens: LayerMetrics(
                **{name: tuple(getattr(layer, name) for layer in figures.layers) for name in LayerMetrics.model_fields}
            )
            for tokens, figures in reconstruction.items()
        },
    )


def describe(metrics: Metrics, replaced: str = "every MLP") -> list[str]:
    """The figures of `evaluate_summary` as lines, for the log of a run; what was not measured is left out."""
    m = metrics

    def with_worst(mean: float | None, worst: float | None) -> str:
        return "none" if mean is None or worst is None else f"{mean:.3f} (worst layer {worst:.3f})"

    lines = [
        f"R² {with_worst(m.r2, m.r2_worst)}, without outlier tokens {with_worst(m.r2_kept, m.r2_kept_worst)}, "
        f"[CLS] {with_worst(m.r2_cls, m.r2_cls_worst)}",
        f"median relative error {m.relative_error:.3f}, [CLS] {m.relative_error_cls:.3f}; cosine {m.cosine:.3f}; "
        f"outlier tokens {m.outliers:.2%}; dead features {m.dead_share:.2%}",
    ]
    if m.replacement_all_agreement is not None and m.replacement_cls_agreement is not None:
        lines.append(
            f"same top-1 as CLIP: {m.replacement_all_agreement:.1%} with {replaced} replaced, "
            f"{m.replacement_cls_agreement:.1%} with them replaced only at [CLS]"
        )
    if m.zero_shot_top1 is not None and m.replacement_all_top1 is not None and m.replacement_cls_top1 is not None:
        lines.append(
            f"zero-shot top-1: {m.zero_shot_top1:.1%}; {m.replacement_all_top1:.1%} with {replaced} replaced, "
            f"{m.replacement_cls_top1:.1%} with them replaced only at [CLS]"
        )
    return lines


def cls_warning(metrics: Metrics, recipe: Recipe) -> str | None:
    """What there is to say of a CLT that explains [CLS], the token that answers are about, worse than `LEAST_CLS`."""
    r2, worst = metrics.r2_cls, metrics.r2_cls_worst
    if not isinstance(recipe, CltRecipe) or r2 is None or worst is None or r2 >= LEAST_CLS:
        return None
    return (
        f"R² at [CLS], the token that answers explain, is {r2:.2f} (worst layer {worst:.2f}); below {LEAST_CLS} an "
        "account consists mostly of errors: train longer, use a larger clt.k_cls or training.cls_weight, or set "
        'training.start = "neurons"'
    )


def label_embeddings(clip: Clip, images: HeldOut, templates: Sequence[str], console: Console) -> Tensor:
    """[labels, D]; there may be none."""
    if not images.labels:
        return torch.zeros(0, clip.tower.embedding)

    def tracked(names: list[str]) -> Iterable[str]:
        return track(names, "label embeddings", len(names), console, "labels")

    return clip.encode_labels(list(images.labels), list(templates), tracked)


def _gains(ours: Cascades, theirs: Cascades, bootstrap: Bootstrap) -> list[Estimate | None]:
    """Top-1 of ours minus theirs, by cascade."""
    return [if_known(gain) for gain in bootstrap.estimates((ours.right - theirs.right).numpy())]


def _faithfulness(measured: Measurements, images: HeldOut, bootstrap: Bootstrap) -> Faithfulness | None:
    return measured.interventions.figures(bootstrap, measured.cascades.clip_right) if images.labels else None


def open_checkpoint(checkpoint: Path, clip: Clip) -> tuple[CrossLayerTranscoder, CheckpointMeta]:
    """A checkpoint's CLT and metadata. Raises `CheckpointError` if it belongs to another CLIP."""
    clt, _, meta = load_clt(checkpoint)
    check_clip(checkpoint, meta, clip)
    return clt, meta
