"""The results of residual SAEs as tables for the terminal and the report."""

from __future__ import annotations

from vitrine.models.account.windows import TOKENS
from vitrine.training.evaluation.results import Cascade
from vitrine.training.evaluation.sae_results import Beside, Levels, SaeResults, UnitFigure
from vitrine.training.report.tables import (
    TOKEN_NAMES,
    Sheet,
    interval,
    nodes,
    of_layer,
    or_none,
    percent,
    points,
    rows_of,
)


def of_saes(results: SaeResults) -> dict[str, Sheet]:
    """All tables, in display order."""
    tables = {"reconstruction": versions(results)}
    if results.cascades:
        tables |= {"singles": singles(results), "cascades": cascades(results)}
    if results.nodes:
        tables["nodes"] = nodes(results.nodes)
    tables["levels"] = levels(results.levels)
    if results.beside:
        tables["beside"] = beside(results, results.beside)
    return tables


def versions(results: SaeResults) -> Sheet:
    """By SAE, the mean over them, and the worst: of standardised tokens, and of the stream itself."""
    columns = ["after block", *(f"explained, {TOKEN_NAMES[tokens]}" for tokens in TOKENS), "cosine", "relative error"]
    columns += ["raw, all", "raw, without outliers", "raw cosine", "L0 [CLS]", "L0 patches", "dead"]
    rows = []
    for layer in rows_of(results):
        own = {tokens: of_layer(results.reconstruction[tokens], layer) for tokens in TOKENS}
        raw = of_layer(results.raw["all"], layer)
        row = [f"{own[tokens].r2:.4f}" for tokens in TOKENS]
        row += [f"{own['all'].cosine:.4f}", f"{own['all'].relative_error:.4f}"]
        row += [f"{raw.r2:.4f}", or_none(raw.r2_kept), f"{raw.cosine:.4f}"]
        row += [f"{own['cls'].l0:.1f}", f"{own['patches'].l0:.1f}", f"{own['all'].dead_share:.1%}"]
        rows.append([str(layer), *row])
    r2 = results.reconstruction["all"].r2
    return Sheet(
        f"Fraction of variance explained, of standardised tokens and of the raw stream, on {results.images:,} images. "
        f"Mean over SAEs {r2.value:.4f} [{r2.low:.4f}, {r2.high:.4f}]. Cosine, error and dead features: all tokens.",
        columns,
        rows,
    )


def singles(results: SaeResults) -> Sheet:
    """By the block after which the stream is replaced."""
    is_known = results.baseline is not None
    columns = ["after block", *(["top-1", "change"] if is_known else []), "same prediction", "divergence"]
    rows = [[str(cascade.first), *_fidelity(cascade, is_known)] for cascade in results.singles]
    own = f": zero-shot top-1, CLIP itself {percent(results.baseline)}. Changes in points" if is_known else ""
    return Sheet(f"Stream replaced after one block, all tokens{own}.", columns, rows)


def _fidelity(cascade: Cascade, is_known: bool) -> list[str]:
    accuracies = [percent(cascade.top1), points(cascade.difference)] if is_known else []
    return [*accuracies, f"{cascade.agreement.value:.1%}", f"{cascade.divergence.value:.4f}"]


def cascades(results: SaeResults) -> Sheet:
    """By window and replaced tokens."""
    is_known = results.baseline is not None
    accuracies = ["top-1", "change"] if is_known else []
    rows = [
        [cascade.window, TOKEN_NAMES[cascade.tokens], *_fidelity(cascade, is_known)] for cascade in results.cascades
    ]
    return Sheet(
        "Stream replaced after several blocks: every later block and SAE reads the result of the earlier ones. "
        "Divergence from CLIP's own distribution in nats.",
        ["after blocks", "tokens", *accuracies, "same prediction", "divergence"],
        rows,
        text=2,
    )


def levels(measured: Levels) -> Sheet:
    """By SAE: what its features answer to, beside chance, the untrained SAE and the stream's channels."""
    names = {"position": "position", "of_class": "class", "colour": "colour", "purity": "purity"}
    columns = ["after block", "counted"]
    for name in names.values():
        columns += [f"{name}, above chance", name]
    columns += ["position over .5", "fires", "spread", "evenness"]
    rows = []
    for layer, own in enumerate(measured.features):
        row = [str(layer), f"{own.counted:,} of {own.units:,}"]
        for name in names:
            figure: UnitFigure | None = getattr(own, name)
            beside = (getattr(kind[layer], name) for kind in (measured.untrained, measured.neurons))
            medians = [
                figure and figure.median,
                figure and figure.chance,
                *(other and other.median for other in beside),
            ]
            row += ["–" if figure is None else f"{figure.above:.0%}", " · ".join(map(_share, medians))]
        row.append("–" if own.position is None else f"{own.position.over_half:.1%}")
        rows.append([*row, *(_share(figure) for figure in (own.fires, own.spread, own.evenness))])
    return Sheet(
        f"What features respond to at patches, {measured.images:,} images of {measured.classes:,} classes: medians "
        "over features that fire in 16 images or more · over shuffled ones · over an untrained SAE's · over neurons. "
        "Above chance: share of features above 95 % of the shuffled figures.",
        columns,
        rows,
    )


def _share(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.3f}".removeprefix("0")


def beside(results: SaeResults, measured: Beside) -> Sheet:
    """The two dictionaries, a column each."""
    sides = (measured.saes, measured.clt)
    rows = [
        ["trained parameters", *(f"{side.parameters:,}" for side in sides)],
        ["features of all layers", *(f"{side.features:,}" for side in sides)],
        ["active features per token and layer", *(f"{side.l0:.1f}" for side in sides)],
        ["R², mean over layers", *(f"{side.r2:.4f}" for side in sides)],
    ]
    replaced = [side.replaced for side in sides]
    if results.baseline:
        rows.append(["change in top-1, everything replaced", *(points(c.difference if c else None) for c in replaced)])
    if all(replaced):
        rows.append(["same prediction, everything replaced", *(percent(c.agreement if c else None) for c in replaced)])
        rows.append(
            ["divergence, everything replaced", *("–" if c is None else f"{c.divergence.value:.4f}" for c in replaced)]
        )
    if results.nodes and measured.nodes:
        curves = results.nodes.curve("relevance"), measured.nodes.curve("sources_mean")
        rows += [
            ["deletion area", *(interval(curve.deletion_area) for curve in curves)],
            ["insertion area", *(interval(curve.insertion_area) for curve in curves)],
            ["regained by 2 % of the nodes", *(interval(curve.regained) for curve in curves)],
            ["active nodes per image", *(f"{curve.active:,.0f}" for curve in curves)],
            [
                "nodes that regain 80 % of the logit",
                *("–" if s.inserted is None else f"{s.inserted:,.0f}" for s in sides),
            ],
        ]
    circuits = [side.circuits for side in sides if side.circuits]
    if len(circuits) == len(sides):
        rows += [
            ["circuit: nodes, edges", *(f"{c.nodes:,.0f}, {c.edges:,.0f}" for c in circuits)],
            ["circuit: influence not followed", *(f"{c.left_out:.0%}" for c in circuits)],
            ["circuit: replacement score", *(f"{c.replacement:.2f}" for c in circuits)],
            ["circuit: completeness", *(f"{c.completeness:.2f}" for c in circuits)],
            ["circuit: seconds on this CPU", *(f"{c.seconds:.1f}" for c in circuits)],
        ]
    caption = (
        "The two dictionaries on the same images, each ranked by its own account: the SAEs by relevance, about "
        "medians; the CLT by sources about the mean, with means over the same train images."
    )
    if circuits:
        caption += (
            f" Circuits: medians of {circuits[0].images} images, {circuits[0].followed:,.0f} features followed back, "
            "pruned to .8 of the nodes' influence and .98 of the edges'; nodes are token by token."
        )
    columns = ["", f"residual SAEs, {measured.saes.name}", f"CLT, {measured.clt.name}"]
    return Sheet(caption, columns, rows)
