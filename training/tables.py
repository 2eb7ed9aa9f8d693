"""results.json for the terminal, the paper's figures beside ours where they are of the same kind."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from training import paper
from training.faithfulness import TOP
from training.reconstruction import TOKENS
from training.results import Estimate, Results

TOKEN_NAMES = {"all": "all", "cls": "[CLS]", "patches": "patches"}
RANKING_NAMES = {"all": "all tokens", "cls": "[CLS]", "image": "image by image"}


def percent(estimate: Estimate) -> str:
    """76.5 % [73.8, 79.1]."""
    return f"{100 * estimate.value:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def points(estimate: Estimate) -> str:
    """−0.4 [−1.0, +0.2], in percentage points."""
    return f"{_signed(estimate.value)} [{_signed(estimate.low)}, {_signed(estimate.high)}]"


def paper_range(change: tuple[float, float] | None) -> str:
    """−11.6 to −3.1, or nothing."""
    return "" if change is None else f"{_signed(change[0] / 100)} to {_signed(change[1] / 100)}"


def print_results(results: Results, console: Console) -> None:
    """All tables."""
    for table in (reconstruction(results), cascades(results), faithfulness(results), contributions(results)):
        console.print(table)
        console.print()
    if results.retrieval:
        console.print(retrieval(results))


def reconstruction(results: Results) -> Table:
    known = paper.R2.get(results.recipe.clt.sparsifier)
    beside = f"; the paper's R² {known[0]:.3f} to {known[1]:.3f}" if known else ""
    table = _table(f"Reconstruction, {results.images:,} images{beside}")
    table.add_column("layer")
    for tokens in TOKENS:
        table.add_column(f"R² {TOKEN_NAMES[tokens]}", justify="right")
    for name in ("cosine", "MSE", "L0 [CLS]", "L0 patches", "dead"):
        table.add_column(name, justify="right")
    found = results.reconstruction
    every, at_cls, patches = found["all"], found["cls"], found["patches"]
    for layer in range(results.layers):
        r2 = [found[tokens].layers[layer].r2 for tokens in TOKENS]
        figures = every.layers[layer]
        l0 = at_cls.layers[layer].l0, patches.layers[layer].l0
        table.add_row(str(layer), *_reconstruction_row(r2, figures.cosine, figures.mse, l0, figures.dead_share))
    table.add_section()
    means = [found[tokens].r2.value for tokens in TOKENS]
    l0 = at_cls.l0, patches.l0
    table.add_row("mean", *_reconstruction_row(means, every.cosine, every.mse, l0, every.dead_share))
    return table


def _reconstruction_row(r2: list[float], cosine: float, mse: float, l0: tuple[float, float], dead: float) -> list[str]:
    return [
        *(f"{value:.4f}" for value in r2),
        f"{cosine:.4f}",
        f"{mse:.2e}",
        *(f"{value:.1f}" for value in l0),
        f"{dead:.1%}",
    ]


def cascades(results: Results) -> Table:
    table = _table(f"Cascaded replacement, zero-shot top-1; CLIP itself {percent(results.baseline)}")
    for name in ("layers replaced", "tokens"):
        table.add_column(name)
    for name in ("top-1", "change, points", "the paper's change", "same prediction as CLIP"):
        table.add_column(name, justify="right")
    if results.comparison:
        table.add_column(f"top-1 of {results.comparison.name}", justify="right")
        table.add_column("ours minus that", justify="right")
    rival = results.comparison
    for at, cascade in enumerate(results.cascades):
        table.add_row(
            cascade.window,
            TOKEN_NAMES[cascade.tokens],
            percent(cascade.top1),
            points(cascade.difference),
            paper_range(paper.cascade_change(results.layers, cascade.first, cascade.tokens)),
            f"{100 * cascade.agreement.value:.1f} %",
            *([percent(rival.cascades[at].top1), points(rival.gains[at])] if rival else []),
        )
    return table


def faithfulness(results: Results) -> Table:
    found = results.faithfulness
    table = _table("Last layer at [CLS], rebuilt from some source layers: change of top-1, points")
    table.add_column("ranked by C at")
    for name in ("drop top-1", "the paper's", "keep top-4", "the paper's ", "drop top-1 / drop any"):
        table.add_column(name, justify="right")
    for curve in found.curves:
        times = found.times_random(curve.ranking)
        table.add_row(
            RANKING_NAMES[curve.ranking],
            points(curve.drop_top1),
            paper_range(paper.intervention_change(curve.ranking, "drop_top1")),
            points(curve.keep_top4),
            paper_range(paper.intervention_change(curve.ranking, "keep_top4")),
            "" if times is None else f"{times:.1f} ×",
        )
    kept, dropped = _random_change(results)
    table.add_row("random order", dropped, "", kept, "", "")
    table.caption = (
        f"All source layers kept: {points_between(found.curves[0].drop[0], results.baseline)}. "
        f"One dropped, mean over layers: {points_between(found.drop_one_mean, results.baseline)}."
    )
    return table


def contributions(results: Results) -> Table:
    last = results.layers - 1
    table = _table(f"C onto layer {last}, by source layer")
    table.add_column("tokens")
    for layer in range(results.layers):
        table.add_column(str(layer), justify="right")
    for tokens in ("cls", "patches"):
        scores = results.contributions[tokens]
        table.add_row(TOKEN_NAMES[tokens], *(f"{score:.3f}" for score in scores.raw[last]))
        table.add_row(f"{TOKEN_NAMES[tokens]} centred", *(f"{score:.3f}" for score in scores.centred[last]))
        if results.layers == paper.LAYERS:
            known = paper.ONTO_LAST[tokens]
            table.add_row(f"{TOKEN_NAMES[tokens]} the paper's", *(f"{score:.3f}" for score in known), style="dim")
    return table


def retrieval(results: Results) -> Table:
    found = results.retrieval
    assert found is not None
    table = _table(
        f"Retrieval by sparse code at [CLS]: share of the {found.k} nearest images with the query's class "
        f"({found.queries:,} queries)"
    )
    table.add_column("by")
    table.add_column("share", justify="right")
    for layer, share in enumerate(found.layers):
        table.add_row(f"layer {layer}", percent(share))
    table.add_section()
    table.add_row("CLIP's embedding", percent(found.embedding))
    table.add_row("chance", f"{100 * found.chance:.1f} %")
    return table


def points_between(found: Estimate, baseline: Estimate) -> str:
    """The change of one top-1 to another, in points."""
    return _signed(found.value - baseline.value)


def _random_change(results: Results) -> tuple[str, str]:
    """(keep four, drop one) in random orders: mean and spread of the change."""
    found, own = results.faithfulness, results.baseline.value
    if not found.random_keep:
        return "", ""
    kept, dropped = found.random_keep[min(TOP, results.layers)], found.random_drop[1]
    return (
        f"{_signed(kept.mean - own)} ± {100 * kept.deviation:.1f}",
        f"{_signed(dropped.mean - own)} ± {100 * dropped.deviation:.1f}",
    )


def _signed(share: float) -> str:
    text = f"{100 * share:+.2f}".replace("-", "−")
    return "0.00" if text.strip("+−") == "0.00" else text


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, caption_justify="left"
    )
