"""Interventions for the terminal: predictions before and after, and what made the difference."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrine.models.tables import show
from vitrine.service.exports.rows import ledger_rows
from vitrine.service.schemas.intervene import (
    CounterfactualAnswer,
    ExplanationChange,
    InterveneResponse,
    Member,
    Variant,
)

LEAST = 0.0005  # logits; rows that change by less are not listed


def print_intervention(answer: InterveneResponse, features: int, console: Console) -> None:
    """Print what would have to go, if that was asked for; predictions before and after; rows and `features` features
    that contribute more or less."""
    for warning in answer.warnings:
        console.print(Text(f"warning: {warning.message}", style="yellow"))
    if answer.counterfactual is not None:
        _print_counterfactual(answer.counterfactual, console)
    for variant in answer.results:
        _print_predictions(variant, console)
        for change in variant.difference.explanations:
            console.print()
            show(_changes(change, features), console)
        if variant.edits:
            how = "only the final residual at [CLS] was changed" if answer.mode == "direct" else "the network ran again"
            console.print(f"\nmode {answer.mode}: {how}.", highlight=False)


def _print_predictions(variant: Variant, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for heading, justify in (("label", "left"), ("before", "right"), ("after", "right")):
        table.add_column(heading, justify="left" if justify == "left" else "right")
    first = variant.after.predictions[0].label
    for row in sorted(variant.difference.probabilities, key=lambda row: -row.after):
        style = "bold" if row.label == first else ""
        table.add_row(Text(row.label), f"{row.before:.1%}", f"{row.after:.1%}", style=style)
    show(table, console)


def _changes(change: ExplanationChange, features: int) -> Table:
    """Of one logit, by row and by feature; after less before."""
    contrast = f" rather than {change.contrast}" if change.contrast else ""
    title = Text(f"{change.target}{contrast}: its logit changes by {change.logit:+.3f}")
    table = Table(title=title, box=None, title_justify="left")
    for heading in ("row", "logits", "what"):
        table.add_column(heading, justify="right" if heading == "logits" else "left", overflow="fold")
    for row in ledger_rows(change.ledger):
        if abs(row.value) >= LEAST and row.kind != "remainder":
            table.add_row(row.name, f"{row.value:+.3f}", "")
    table.add_section()
    for feature in change.features[:features]:
        activation = f"activation {feature.activation_before:.2f} → {feature.activation_after:.2f}"
        said = f"{feature.label}, {activation}" if feature.label else activation
        table.add_row(f"  feature {feature.layer}/{feature.index}", f"{feature.contribution:+.3f}", Text(said))
    return table


def _print_counterfactual(found: CounterfactualAnswer, console: Console) -> None:
    """What would have to go, and the way there."""
    if not found.path:
        said = "comes first already" if found.found else f"was not searched for: {found.stopped}"
        console.print(f"{found.label} {said}.\n", highlight=False, markup=False)
        return
    table = Table(
        box=None, title_justify="left", title=Text(f"Steps towards {found.label}, one {found.of[:-1]} per row")
    )
    for heading in ("without", "comes first", found.label, "lead"):
        table.add_column(Text(heading), justify="left" if heading in ("without", "comes first") else "right")
    for step in found.path:
        table.add_row(Text(_named(step.member, found)), Text(step.top1), f"{step.probability:.1%}", f"{step.lead:+.2f}")
    show(table, console)
    if not found.found:
        console.print(f"No solution was found: {found.stopped}.", highlight=False)
        return
    every = "all of them are needed" if found.minimal else "possibly not all of them are needed"
    names = ", ".join(_named(member, found) for member in found.members)
    console.print(
        f"{found.label} comes first without these {len(found.members)}, and {every}: {names}\n",
        highlight=False,
        markup=False,
    )


def _named(member: Member, found: CounterfactualAnswer) -> str:
    if member.token is not None:
        row, column = divmod(member.token - 1, found.columns)
        return f"patch in row {row + 1}, column {column + 1}"
    return f"{member.layer}/{member.index}" + (f" {member.label}" if member.label else "")
