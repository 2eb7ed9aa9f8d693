"""Edits that may be proposed for some features: what is done to them, and at which tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vitrine.models.interventions.spec import Intervention, Mode, Tokens
from vitrine.service.offline.debias.firing import Firing


@dataclass(frozen=True)
class Feature:
    """Of the CLT."""

    layer: int
    index: int


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


@dataclass(frozen=True)
class Candidate:
    """The first `count` features of a ranking, all changed in one way."""

    op: str  # of `OPS`
    count: int
    mode: Mode
    tokens: Tokens | None = None  # None: what the op does by itself

    def interventions(self, features: Sequence[Feature], firings: Sequence[Firing]) -> tuple[Intervention, ...]:
        """features, firings: in the ranking's order; at least `count` of each."""
        make = OPS[self.op]
        some = zip(features[: self.count], firings[: self.count], strict=True)
        return tuple(make(feature, firing, self.tokens) for feature, firing in some)

    @property
    def title(self) -> str:
        tokens = "" if self.tokens is None else f" at {self.tokens}"
        return f"{self.op}{tokens}, {self.count} features, {self.mode}"
