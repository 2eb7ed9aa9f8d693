"""A circuit for the terminal: its features, each over all tokens, with what feeds them most, and where it ends."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrine.service.schemas.circuit import CircuitNode, CircuitResponse

FED_BY = 3  # names beside each feature
Name = tuple[str, int, int]  # kind, layer, index; -1 where there is none


@dataclass
class Group:
    """The nodes of one feature at all tokens, or all errors of a layer, or all embeddings."""

    label: str | None
    tokens: int = 0
    influence: float = 0.0
    contribution: float = 0.0
    fed_by: defaultdict[Name, float] = field(default_factory=lambda: defaultdict(float))


def grouped(answer: CircuitResponse) -> dict[Name, Group]:
    """The circuit's nodes summed over tokens, the most influential first; `fed_by` sums the edges into each."""
    groups: dict[Name, Group] = {}
    for node in answer.nodes:
        group = groups.setdefault(_name(node), Group(node.label))
        group.tokens += 1
        group.influence += node.influence
        group.contribution += node.contribution
    for edge in answer.edges:
        if edge.target is not None:
            source, target = answer.nodes[edge.source], answer.nodes[edge.target]
            groups[_name(target)].fed_by[_name(source)] += edge.weight
    return dict(sorted(groups.items(), key=lambda item: -item[1].influence))


def print_circuit(answer: CircuitResponse, count: int, console: Console) -> None:
    """Print the `count` most influential features, and the scores."""
    contrast = f" rather than {answer.contrast}" if answer.contrast else ""
    groups = grouped(answer)
    table = Table(
        title=Text(f"What made {answer.target}{contrast} (logit {answer.logit:.2f})"), box=None, title_justify="left"
    )
    table.add_column("feature")
    table.add_column("tokens", justify="right")
    table.add_column("influence", justify="right")
    table.add_column("straight to the logit", justify="right")
    table.add_column("fed most by", overflow="fold")
    for name, group in list(groups.items())[:count]:
        fed = sorted(group.fed_by.items(), key=lambda item: -abs(item[1]))[:FED_BY]
        sources = "  ".join(f"{_title(source, groups[source].label)} {weight:+.2f}" for source, weight in fed)
        row = (str(group.tokens), f"{group.influence:.1%}", f"{group.contribution:+.3f}")
        table.add_row(Text(_title(name, group.label)), *row, Text(sources))
    console.print(table)
    for warning in answer.warnings:
        console.print(Text(f"warning: {warning.message}", style="yellow"))
    scores = answer.scores
    console.print(
        f"\n{len(answer.nodes):,} nodes, {len(answer.edges):,} edges; {answer.followed:,} of {answer.active:,} active "
        f"features were followed back.\nThe influence ends at embeddings ({scores.embeddings:.0%}), errors "
        f"({scores.errors:.0%}) and features that were not followed ({scores.left_out:.0%}).\n"
        f"Replacement score {scores.replacement:.2f}, completeness {scores.completeness:.2f}.",
        highlight=False,
    )


def _name(node: CircuitNode) -> Name:
    return node.kind, -1 if node.layer is None else node.layer, -1 if node.index is None else node.index


def _title(name: Name, label: str | None) -> str:
    kind, layer, index = name
    if kind == "feature":
        return f"{layer}/{index}" + (f" {label}" if label else "")
    return "embeddings" if kind == "embedding" else f"error {layer}"
