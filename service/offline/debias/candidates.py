"""Edits that may be proposed: what is done to some features, and at which tokens; or to the groups' directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vitrine.models.account.ledger import Array
from vitrine.models.interventions.edit import Condition
from vitrine.models.interventions.spec import Intervention, Mode, Tokens
from vitrine.service.offline.debias.directions import Direction
from vitrine.service.offline.debias.firing import Firing


@dataclass(frozen=True)
class Feature:
    """Of the CLT."""

    layer: int
    index: int


@dataclass(frozen=True)
class Found:
    """What the edits are made of, the most wanted first."""

    features: Sequence[Feature]
    firings: Sequence[Firing]  # of each feature
    directions: Sequence[Direction]
    middle: Array  # [d] the mean stream at [CLS] after the last block, every cell counted alike
    layers: int  # of the CLIP


Make = Callable[[Feature, Firing, Tokens | None], Intervention]


def _ablate(feature: Feature, _: Firing, tokens: Tokens | None) -> Intervention:
    return Intervention(op="ablate", layer=feature.layer, index=feature.index, tokens=tokens)


def _ablate_to_mean(feature: Feature, _: Firing, tokens: Tokens | None) -> Intervention:
    return Intervention(op="ablate", layer=feature.layer, index=feature.index, tokens=tokens, to="mean")


def _set_between(feature: Feature, firing: Firing, tokens: Tokens | None) -> Intervention:
    where = firing.tokens if tokens is None else tokens
    return Intervention(op="set", layer=feature.layer, index=feature.index, tokens=where, value=firing.between)


def _project(feature: Feature, _: Firing, tokens: Tokens | None) -> Intervention:
    return Intervention(op="project", layer=feature.layer, index=feature.index, tokens=tokens)


def _project_to_mean(feature: Feature, _: Firing, tokens: Tokens | None) -> Intervention:
    return Intervention(op="project", layer=feature.layer, index=feature.index, tokens=tokens, to="mean")


def _project_reading(feature: Feature, _: Firing, tokens: Tokens | None) -> Intervention:
    return Intervention(op="project", layer=feature.layer, index=feature.index, tokens=tokens, direction="encoder")


OPS: dict[str, Make] = {
    "ablate": _ablate,  # the picture is taken for one without the cue
    "ablate to mean": _ablate_to_mean,  # for the average picture, as the bundle has it
    "set between the groups": _set_between,  # for one half-way between, where the features fire
    "project": _project,
    "project to mean": _project_to_mean,
    "project what they read": _project_reading,
}
DIRECTION = "set the groups' direction between them"  # at [CLS] after the last layer
EDITS = (*OPS, DIRECTION)


@dataclass(frozen=True)
class Candidate:
    """The first `count` features of a ranking, or directions, all changed in one way."""

    op: str  # of `OPS`, or `DIRECTION`
    count: int
    mode: Mode
    tokens: Tokens | None = None  # None: what the op does by itself
    shift: float = 0.0  # of directions: how far beyond the middle, as a share of the difference between the groups
    moves_logit: float | None = None  # applied only where it moves the lead by as many logits; None: always

    def interventions(self, found: Found) -> tuple[Intervention, ...]:
        """found: at least `count` features, or directions."""
        if self.op == DIRECTION:
            return tuple(
                Intervention(
                    op="project",
                    layer=found.layers - 1,
                    vector=one.vector,
                    value=one.between + self.shift * one.length,
                    tokens="cls",
                )
                for one in found.directions[: self.count]
            )
        make = OPS[self.op]
        some = zip(found.features[: self.count], found.firings[: self.count], strict=True)
        return tuple(make(feature, firing, self.tokens) for feature, firing in some)

    @property
    def condition(self) -> Condition | None:
        """Of the edit."""
        return None if self.moves_logit is None else Condition(moves_logit=self.moves_logit)

    @property
    def of_features(self) -> bool:
        """Whether features are changed."""
        return self.op != DIRECTION

    @property
    def title(self) -> str:
        tokens = "" if self.tokens is None else f" at {self.tokens}"
        tokens += f", {self.shift:+.1f} of the groups' distance from the middle" if self.shift else ""
        what = f"{self.count} {'feature' if self.of_features else 'direction'}{'' if self.count == 1 else 's'}"
        where = "" if self.moves_logit is None else f", if that changes the lead by {self.moves_logit:.2f} logits"
        return f"{self.op}{tokens}, {what}, {self.mode}{where}"
