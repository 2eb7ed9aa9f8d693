"""Circuits summed over tokens, and the mean of many images' circuits."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from vitrine.service.schemas.base import Notice
from vitrine.service.schemas.circuit import CircuitNode, CircuitResponse, CircuitScores
from vitrine.service.schemas.circuit_groups import CircuitGroup, GroupedCircuit, GroupEdge, GroupToken

Name = tuple[str, int, int]  # kind, layer, index; -1 where there is none
MEANS = ("logit", "unfollowed_share", "nodes", "followed", "active", "kept", "kept_share")  # of a `GroupedCircuit`


def grouped(answer: CircuitResponse) -> GroupedCircuit:
    """One image's circuit: its nodes summed over tokens, its edges over those of both ends."""
    nodes: defaultdict[Name, list[CircuitNode]] = defaultdict(list)
    for node in answer.nodes:  # the most influential first
        nodes[_name(node)].append(node)
    groups = sorted(((name, _group(members)) for name, members in nodes.items()), key=lambda item: -item[1].influence)
    place_of = {name: place for place, (name, _) in enumerate(groups)}
    of_node = [place_of[_name(node)] for node in answer.nodes]
    weights: defaultdict[tuple[int, int | None], float] = defaultdict(float)
    for edge in answer.edges:
        weights[of_node[edge.source], None if edge.target is None else of_node[edge.target]] += edge.weight
    return GroupedCircuit(
        model=answer.model,
        warnings=answer.warnings,
        dictionary=answer.dictionary,
        images=1,
        targets={answer.target: 1},
        contrast=answer.contrast,
        logit=answer.logit,
        groups=[group for _, group in groups],
        edges=[GroupEdge(source=s, target=t, weight=weight, images=1) for (s, t), weight in weights.items()],
        unfollowed_share=answer.inflow.unfollowed_share,
        scores=answer.scores,
        nodes=len(answer.nodes),
        followed=answer.followed,
        active=answer.active,
        kept=answer.kept,
        kept_share=answer.kept_share,
        layers=answer.layers,
        rows=answer.rows,
        columns=answer.columns,
    )


def _name(node: CircuitNode | CircuitGroup) -> Name:
    return node.kind, -1 if node.layer is None else node.layer, -1 if node.index is None else node.index


def _group(nodes: list[CircuitNode]) -> CircuitGroup:
    first, influence = nodes[0], sum(node.influence for node in nodes)
    followed = [(node.influence, node.inflow.unfollowed_share) for node in nodes if node.inflow is not None]
    return CircuitGroup(
        kind=first.kind,
        layer=first.layer,
        index=first.index,
        label=first.label,
        label_score=first.label_score,
        images=1,
        tokens=len(nodes),
        influence=influence,
        contribution=sum(node.contribution for node in nodes),
        unfollowed_share=_weighted(followed),
        where=[GroupToken(token=node.token, influence=node.influence, activation=node.activation) for node in nodes],
    )


def _weighted(values: list[tuple[float, float]]) -> float | None:
    """Mean of (weight, value)."""
    weights = sum(weight for weight, _ in values)
    return sum(weight * value for weight, value in values) / weights if weights else None


@dataclass
class _Sum:
    """One group over images."""

    first: CircuitGroup
    images: int = 0
    tokens: float = 0.0
    influence: float = 0.0
    contribution: float = 0.0
    unfollowed: list[tuple[float, float]] = field(default_factory=list)  # (influence, share)

    def add(self, group: CircuitGroup) -> None:
        self.images += 1
        self.tokens += group.tokens
        self.influence += group.influence
        self.contribution += group.contribution
        if group.unfollowed_share is not None:
            self.unfollowed.append((group.influence, group.unfollowed_share))

    def mean(self, images: int) -> CircuitGroup:
        return self.first.model_copy(
            update={
                "images": self.images,
                "tokens": self.tokens / self.images,
                "influence": self.influence / images,
                "contribution": self.contribution / images,
                "unfollowed_share": _weighted(self.unfollowed),
                "where": [],
            }
        )


class MeanCircuit:
    """The mean of circuits of one bundle that are added one by one."""

    def __init__(self) -> None:
        self._first: GroupedCircuit | None = None
        self._groups: dict[Name, _Sum] = {}
        self._edges: defaultdict[tuple[Name, Name | None], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._targets: Counter[str] = Counter()
        self._numbers: defaultdict[str, float] = defaultdict(float)
        self._scores: defaultdict[str, float] = defaultdict(float)
        self._warnings: dict[str, Notice] = {}

    @property
    def images(self) -> int:
        return self._targets.total()

    def add(self, circuit: GroupedCircuit) -> None:
        """circuit: of one image."""
        self._first = self._first or circuit
        self._targets.update(circuit.targets)
        for number in MEANS:
            self._numbers[number] += getattr(circuit, number)
        for score, value in circuit.scores.model_dump().items():
            self._scores[score] += value
        self._warnings |= {notice.message: notice for notice in circuit.warnings}
        names = [_name(group) for group in circuit.groups]
        for name, group in zip(names, circuit.groups, strict=True):
            self._groups.setdefault(name, _Sum(group)).add(group)
        for edge in circuit.edges:
            total = self._edges[names[edge.source], None if edge.target is None else names[edge.target]]
            total[0] += edge.weight
            total[1] += 1

    def mean(self) -> GroupedCircuit:
        """Over all images that were added, one at least."""
        assert self._first is not None
        count = self.images
        groups = sorted(
            ((name, total.mean(count)) for name, total in self._groups.items()), key=lambda item: -item[1].influence
        )
        place_of = {name: place for place, (name, _) in enumerate(groups)}
        edges = [
            GroupEdge(
                source=place_of[source],
                target=None if target is None else place_of[target],
                weight=weight / count,
                images=int(images),
            )
            for (source, target), (weight, images) in self._edges.items()
        ]
        return self._first.model_copy(
            update={
                "warnings": list(self._warnings.values()),
                "images": count,
                "targets": dict(self._targets.most_common()),
                "groups": [group for _, group in groups],
                "edges": edges,
                "scores": CircuitScores(**{name: total / count for name, total in self._scores.items()}),
            }
            | {name: total / count for name, total in self._numbers.items()}
        )
