"""A CLT's results as tables for the terminal and the report, with the paper's figures where they are comparable."""

from __future__ import annotations

from dataclasses import dataclass

from vitrine.models.account.windows import TOKENS
from vitrine.models.bootstrap import Estimate
from vitrine.training.evaluation.faithfulness import TOP
from vitrine.training.evaluation.results import (
    AnyResults,
    Faithfulness,
    LayerFigures,
    NodeFaithfulness,
    Results,
    TokenFigures,
)
from vitrine.training.report import paper

TOKEN_NAMES = {"all": "all", "cls": "[CLS]", "patches": "patches"}
RANKING_NAMES = {"all": "C, all tokens", "cls": "C, [CLS]", "image": "C, image by image"}
NODE_RANKING_NAMES = {
    "sources_mean": "sources, about the mean",
    "sources": "sources",
    "direct": "direct, at [CLS]",
    "gradient": "gradient × activation",
    "activation": "activation",
    "random": "random",
    "relevance": "relevance",
    "through_errors": "relevance, through errors",
    "plain": "relevance, nothing held constant",
    "tokens": "relevance, token by token",
    "neurons": "neurons, relevance",
}


@dataclass(frozen=True)
class Sheet:
    """A table of strings; the first `text` columns are words, the others figures."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    text: int = 1


def of_clt(results: Results) -> dict[str, Sheet]:
    """All tables, in display order."""
    tables = {"reconstruction": reconstruction(results), "outliers": outliers(results)}
    if results.cascades:
        tables["cascades"] = cascades(results)
    tables["contributions"] = contributions(results)
    if results.faithfulness:
        tables["faithfulness"] = faithfulness(results)
    if results.nodes:
        tables["nodes"] = nodes(results.nodes)
    if results.retrieval:
        tables["retrieval"] = retrieval(results)
    return tables


def reconstruction(results: Results) -> Sheet:
    """By layer, the mean over layers, and the worst of them."""
    figures, comparison = results.reconstruction, results.comparison
    columns = ["layer", *(f"R² {TOKEN_NAMES[tokens]}" for tokens in TOKENS)]
    columns += ["cosine", "MSE", "L0 [CLS]", "L0 patches", "dead"]
    if comparison:
        columns += [f"R² all, {comparison.name}", f"R² [CLS], {comparison.name}"]
    rows = []
    for layer in rows_of(results):
        own = {tokens: of_layer(figures[tokens], layer) for tokens in TOKENS}
        row = [f"{own[tokens].r2:.4f}" for tokens in TOKENS]
        row += [f"{own['all'].cosine:.4f}", f"{own['all'].mse:.2e}"]
        row += [f"{own['cls'].l0:.1f}", f"{own['patches'].l0:.1f}", f"{own['all'].dead_share:.1%}"]
        if comparison:
            row += [f"{of_layer(comparison.reconstruction[tokens], layer).r2:.4f}" for tokens in ("all", "cls")]
        rows.append([str(layer), *row])
    paper_r2 = paper.R2.get(results.recipe.clt.sparsifier)
    reference = f" The paper's R²: {paper_r2[0]:.3f} to {paper_r2[1]:.3f}." if paper_r2 else ""
    r2 = figures["all"].r2
    return Sheet(
        f"Reconstruction on {results.images:,} images. "
        f"Mean R² {r2.value:.4f} [{r2.low:.4f}, {r2.high:.4f}].{reference} Cosine, MSE and dead features: all tokens.",
        columns,
        rows,
    )


def outliers(results: Results) -> Sheet:
    """Figures that a few massive tokens cannot own, by layer, the mean over layers, and the worst of them."""
    figures, comparison = results.reconstruction, results.comparison
    columns = ["layer", *(f"R² kept, {TOKEN_NAMES[tokens]}" for tokens in TOKENS)]
    columns += [f"relative error, {TOKEN_NAMES[tokens]}" for tokens in TOKENS]
    columns += [f"outliers, {TOKEN_NAMES[tokens]}" for tokens in ("cls", "patches")]
    if comparison:
        columns += [f"R² kept, all, {comparison.name}", f"relative error, all, {comparison.name}"]
    rows = []
    for layer in rows_of(results):
        own = {tokens: of_layer(figures[tokens], layer) for tokens in TOKENS}
        row = [or_none(own[tokens].r2_kept) for tokens in TOKENS]
        row += [f"{own[tokens].relative_error:.4f}" for tokens in TOKENS]
        row += [f"{own[tokens].outliers:.2%}" for tokens in ("cls", "patches")]
        if comparison:
            other = of_layer(comparison.reconstruction["all"], layer)
            row += [or_none(other.r2_kept), f"{other.relative_error:.4f}"]
        rows.append([str(layer), *row])
    return Sheet(
        "Without outlier tokens, whose MLP output is longer than three times the median of its layer: R² of the "
        "remaining tokens, relative to their mean. Relative error: median of |y − y′|/|y| over all tokens.",
        columns,
        rows,
    )


def or_none(figure: float | None) -> str:
    """Four digits; – where there is no figure."""
    return "–" if figure is None else f"{figure:.4f}"


def rows_of(results: AnyResults) -> list[int | str]:
    """The layers, their mean, and the worst of them."""
    return [*range(results.layers), "mean", "worst"]


def of_layer(figures: TokenFigures, layer: int | str) -> LayerFigures:
    """The figures of a layer, their `mean` over layers, or of the `worst`."""
    named = {"mean": figures.mean, "worst": figures.worst}
    return named[layer] if isinstance(layer, str) else figures.layers[layer]


def cascades(results: Results) -> Sheet:
    """By window and replaced tokens."""
    comparison = results.comparison
    is_known = results.baseline is not None  # which prediction is right
    accuracies = ["top-1", "change", "the paper's change"] if is_known else []
    columns = ["layers replaced", "tokens", *accuracies, "same prediction", "divergence"]
    if comparison:
        accuracies = [f"top-1 of {comparison.name}", f"ours minus {comparison.name}"]
        columns += accuracies if is_known else [f"same prediction, {comparison.name}"]
    rows = []
    for at, cascade in enumerate(results.cascades):
        row = [cascade.window, TOKEN_NAMES[cascade.tokens]]
        if is_known:
            row += [percent(cascade.top1), points(cascade.difference)]
            row += [_from_to(paper.cascade_change(results.layers, cascade.first, cascade.tokens))]
        row += [f"{cascade.agreement.value:.1%}", f"{cascade.divergence.value:.4f}"]
        if comparison and is_known:
            row += [percent(comparison.cascades[at].top1), points(comparison.gains[at])]
        elif comparison:
            row += [f"{comparison.cascades[at].agreement.value:.1%}"]
        rows.append(row)
    own = f": zero-shot top-1, CLIP itself {percent(results.baseline)}. Changes in points" if is_known else ""
    return Sheet(f"Cascaded replacement{own}. Divergence from CLIP's own distribution in nats.", columns, rows, text=2)


def faithfulness(results: Results) -> Sheet:
    """The paper's two interventions on the last layer, with their baselines."""
    measured = results.faithfulness
    assert measured is not None
    if results.baseline is None:
        return _divergences(measured, results.layers)
    own = results.baseline.value
    columns = ["ranked by", "drop the first", "the paper's", "keep the first four", "the paper's"]
    columns += ["harm, top-1", "harm, divergence"]
    rows = []
    for curve in measured.curves:
        harms = measured.harm_in_top1(curve.ranking), measured.harm_in_divergence(curve.ranking)
        rows.append(
            [
                RANKING_NAMES[curve.ranking],
                points(curve.drop_top1),
                _from_to(paper.intervention_change(curve.ranking, "drop_top1")),
                points(curve.keep_top4),
                _from_to(paper.intervention_change(curve.ranking, "keep_top4")),
                *("–" if harm is None else f"{harm:.1f} ×" for harm in harms),
            ]
        )
    if measured.random_keep:
        kept, dropped = measured.random_keep[min(TOP, results.layers)], measured.random_drop[1]
        random_changes = [f"{signed(spread.mean - own)} ± {100 * spread.deviation:.2f}" for spread in (dropped, kept)]
        rows.append([f"{measured.random_orders} random orders", random_changes[0], "", random_changes[1], "", "", ""])
    if measured.drop_one_mean:
        rows.append(["any one layer, mean", signed(measured.drop_one_mean.value - own), "", "", "", "1.0 ×", "1.0 ×"])
    all_kept = measured.curves[0].drop
    from_all = f"From all source layers: {signed(all_kept[0].value - own)}. " if all_kept else ""
    return Sheet(
        f"Layer {results.layers - 1}'s MLP output at [CLS], rebuilt from some source layers: change in top-1, points. "
        f"{from_all}Harm: effect of dropping the first layer, relative to the mean effect of dropping one layer.",
        columns,
        rows,
    )


def _divergences(measured: Faithfulness, layers: int) -> Sheet:
    """The same where it is not known which prediction is right."""
    rows = []
    for curve in measured.curves:
        harm = measured.harm_in_divergence(curve.ranking)
        divergences = curve.drop_divergence[1], curve.keep_divergence[min(TOP, layers)]
        rows.append([RANKING_NAMES[curve.ranking], *(f"{value:.4f}" for value in divergences)])
        rows[-1].append("–" if harm is None else f"{harm:.1f} ×")
    return Sheet(
        f"Layer {layers - 1}'s MLP output at [CLS], rebuilt from some source layers: divergence from CLIP's own "
        f"distribution in nats. From all source layers: {measured.curves[0].drop_divergence[0]:.4f}. Harm: effect of "
        "dropping the first layer, relative to the mean effect of dropping one layer.",
        ["ranked by", "drop the first", "keep the first four", "harm"],
        rows,
    )


def contributions(results: Results) -> Sheet:
    """C onto the last layer."""
    last = results.layers - 1
    columns: dict[str, list[float]] = {}
    for tokens in ("cls", "patches"):
        scores = results.contributions[tokens]
        columns |= {
            f"{TOKEN_NAMES[tokens]} raw": scores.raw[last],
            f"{TOKEN_NAMES[tokens]} centred": scores.centred[last],
        }
        if results.layers == paper.LAYERS:
            columns[f"the paper's {TOKEN_NAMES[tokens]} raw"] = list(paper.ONTO_LAST[tokens])
    rows = [[str(layer), *(f"{column[layer]:.3f}" for column in columns.values())] for layer in range(results.layers)]
    return Sheet(f"Contribution scores C(i→{last}), by source layer i.", ["source layer", *columns], rows)


def nodes(measured: NodeFaithfulness) -> Sheet:
    """Insertion and deletion of nodes in the running network, by ranking."""
    shown = [at for at, fraction in enumerate(measured.fractions) if 0.005 <= fraction <= 0.1]
    columns = ["ranked by", "nodes", f"{measured.nodes} deleted", "same top-1", "deletion area", "insertion area"]
    columns += ["2.0% regain", *(f"{measured.fractions[at]:.1%} inserted" for at in shown)]
    rows = []
    for curve in measured.curves:
        areas = [interval(figure) for figure in (curve.deletion_area, curve.insertion_area, curve.regained)]
        row = [NODE_RANKING_NAMES[curve.ranking], f"{curve.active:,.0f}"]
        row += [interval(curve.at_nodes.above_mean), f"{curve.at_nodes.stays:.0%}", *areas]
        rows.append([*row, *(_decimal(curve.insertion[at].above_mean.value) for at in shown)])
    none_left = measured.curves[0].insertion[0].above_mean.value
    usual = f"medians over {measured.medians:,} train images" if measured.medians else "means"
    return Sheet(
        f"Active nodes set to their {usual} in the running network, {measured.images:,} images: the share that is left "
        f"of the top-1's logit minus the mean over labels; {_decimal(none_left)} with all nodes set. "
        "Regain: the share that is closed of the gap between that and the full logit.",
        columns,
        rows,
    )


def interval(estimate: Estimate) -> str:
    """As in 0.41 [0.33, 0.48]."""
    return f"{_decimal(estimate.value)} [{_decimal(estimate.low)}, {_decimal(estimate.high)}]"


def _decimal(value: float) -> str:
    return f"{value:.2f}"


def retrieval(results: Results) -> Sheet:
    """By layer, with CLIP's embedding and chance."""
    measured = results.retrieval
    assert measured is not None
    rows = [[f"layer {layer}", percent(share)] for layer, share in enumerate(measured.layers)]
    rows += [["CLIP's embedding", percent(measured.embedding)], ["chance", f"{measured.chance:.1%}"]]
    return Sheet(
        f"Retrieval by sparse code at [CLS]: share of the {measured.k} nearest images that have the query's class, "
        f"{measured.queries:,} queries.",
        ["nearest by", "same class"],
        rows,
    )


def percent(estimate: Estimate | None) -> str:
    """As in 76.5% [73.8, 79.1]; – where it is not known."""
    if estimate is None:
        return "–"
    return f"{estimate.value:.1%} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def points(estimate: Estimate | None) -> str:
    """As in −0.40 [−1.00, +0.20], in percentage points."""
    if estimate is None:
        return "–"
    return f"{signed(estimate.value)} [{signed(estimate.low)}, {signed(estimate.high)}]"


def signed(share: float) -> str:
    """A difference of shares, in percentage points."""
    text = f"{100 * share:+.2f}"
    return "0.00" if text[1:] == "0.00" else text


def _from_to(change: tuple[float, float] | None) -> str:
    """A range of points, to the precision of values read off a chart."""
    return "" if change is None else " to ".join(f"{end:+.1f}" for end in change)
