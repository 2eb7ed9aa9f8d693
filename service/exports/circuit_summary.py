"""A circuit for the terminal: its features summed over tokens, what feeds each of them, and where it ends."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrine.models.tables import show
from vitrine.service.schemas.circuit_groups import CircuitGroup, GroupedCircuit, GroupEdge

FED_BY = 3  # names beside each feature
SHOWN = 3  # labels that were explained, and images that could not be used


def print_circuit(circuit: GroupedCircuit, count: int, console: Console) -> None:
    """Print the `count` most influential features, errors and embeddings, and the scores."""
    many = circuit.images > 1
    by = "" if circuit.dictionary == "clt" else ", by residual SAEs"
    mean = "mean " if many else ""
    table = Table(
        title=Text(f"{question(circuit)} ({mean}logit {circuit.logit:.2f}{by})"), box=None, title_justify="left"
    )
    headings = [
        "feature",
        *(["images"] if many else []),
        "tokens",
        "influence",
        "direct effect on the logit",
        "largest sources",
    ]
    for heading in (*headings, "from unfollowed"):
        is_text = heading in ("feature", "largest sources")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    into: defaultdict[int, list[GroupEdge]] = defaultdict(list)
    for edge in circuit.edges:
        if edge.target is not None:
            into[edge.target].append(edge)
    for place, group in enumerate(circuit.groups[:count]):
        fed = sorted(into[place], key=lambda edge: -abs(edge.weight))[:FED_BY]
        sources = "  ".join(f"{_title(circuit.groups[edge.source])} {edge.weight:+.2f}" for edge in fed)
        unfollowed = "" if group.unfollowed_share is None else f"{group.unfollowed_share:.0%}"
        numbers = [f"{group.images:,}"] if many else []
        numbers += [f"{group.tokens:.3g}", f"{group.influence:.1%}", f"{group.contribution:+.3f}"]
        table.add_row(Text(_title(group)), *numbers, Text(sources), unfollowed)
    show(table, console)
    plain: dict[str, Any] = {"style": "yellow", "markup": False, "highlight": False, "soft_wrap": True}
    for warning in circuit.warnings:
        console.print(f"warning: {warning.message}", **plain)
    scores, each = circuit.scores, "Mean per image: " if many else ""
    console.print(
        f"\n{each}{_number(circuit.nodes)} nodes. Of {_number(circuit.active)} active features, "
        f"{_number(circuit.followed)} were followed back and {_number(circuit.kept)} ({circuit.kept_share:.1%}) are in "
        f"the circuit.\nThe influence ends at embeddings ({scores.embeddings:.0%}), errors ({scores.errors:.0%}) and "
        f"features that were not followed ({scores.left_out:.0%}).\n"
        f"Replacement score {scores.replacement:.2f}, completeness {scores.completeness:.2f}.",
        highlight=False,
    )
    if circuit.unreadable:
        codes = ", ".join(f"{number:,} {code}" for code, number in circuit.failed.items())
        rest = len(circuit.unreadable) - SHOWN
        more = f" and {rest:,} more" if rest > 0 else ""
        console.print(f"left out: {codes} ({'; '.join(circuit.unreadable[:SHOWN])}{more})", **plain)
    for line in circuit.skipped:
        console.print(line, **plain)


def question(circuit: GroupedCircuit) -> str:
    """What the circuit answers: "What made cat rather than dog in 12 images"."""
    names = list(circuit.targets)
    named = names[0]
    if len(names) > 1:
        shown = ", ".join(f"{label} {images:,}" for label, images in list(circuit.targets.items())[:SHOWN])
        named = f"the top-1 ({shown}{', …' if len(names) > SHOWN else ''})"
    rather = f" rather than {circuit.contrast}" if circuit.contrast else ""
    images = f" in {circuit.images:,} images" if circuit.images > 1 else ""
    return f"What made {named}{rather}{images}"


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _title(group: CircuitGroup) -> str:
    if group.kind == "feature":
        return f"{group.layer}/{group.index}" + (f" {group.label}" if group.label else "")
    return "embeddings" if group.kind == "embedding" else f"error {group.layer}"
