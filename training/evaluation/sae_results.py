"""results.json of residual SAEs: as `training.evaluation.results`, and what only they have."""

from __future__ import annotations

from vitrine.models.account.windows import Tokens
from vitrine.training.evaluation.results import AnyResults, Cascade, NodeFaithfulness, Part, TokenFigures
from vitrine.training.recipes.recipe import ResidualSaeRecipe


class UnitFigure(Part):
    """Of the units of a layer that fire often enough to be counted: shares, as `training.evaluation.unit_statistics`
    defines them."""

    median: float
    low: float  # quartiles
    high: float
    chance: float  # median of the shuffled figures
    above: float  # share of units above 95 % of the shuffled figures
    over_half: float  # share of units above a half


class LayerLevels(Part):
    """What one layer's units answer to; None: nothing to be said, or no classes."""

    units: int
    counted: int
    position: UnitFigure | None
    of_class: UnitFigure | None
    colour: UnitFigure | None
    purity: UnitFigure | None
    fires: float | None  # medians
    spread: float | None
    evenness: float | None


class Levels(Part):
    """Features of residual SAEs by layer, beside those of the untrained SAEs and the stream's channels
    (`training.evaluation.levels`)."""

    images: int
    classes: int
    features: list[LayerLevels]
    untrained: list[LayerLevels]
    neurons: list[LayerLevels]


class CircuitFigures(Part):
    """Circuits of single images (`training.evaluation.circuits`), medians over them."""

    images: int
    followed: float  # features whose sources were looked for
    nodes: float  # of the pruned circuit
    edges: float
    replacement: float  # circuit-tracer's scores
    completeness: float
    left_out: float  # share of the influence that ends at features which were not followed
    seconds: float  # on this machine's CPU, trace, expansion and pruning


class Side(Part):
    """One of two dictionaries that are compared."""

    name: str
    checkpoint_sha256: str
    parameters: int
    features: int  # of all layers
    l0: float  # active features per token, mean over layers
    r2: float  # of what it is trained on, all tokens, mean over layers
    replaced: Cascade | None  # everything replaced, all tokens; None: no labels
    inserted: float | None  # nodes that regain 80 % of the logit, by its own account
    circuits: CircuitFigures | None


class Beside(Part):
    """Residual SAEs and a CLT on the same images (`training.evaluation.beside`)."""

    saes: Side
    clt: Side
    nodes: NodeFaithfulness | None  # of the CLT


class SaeResults(AnyResults):
    """Of residual SAEs: `layers` is their number, one less than blocks; `reconstruction`: of standardised tokens."""

    recipe: ResidualSaeRecipe
    raw: dict[Tokens, TokenFigures]  # of the stream itself
    singles: list[Cascade]  # the stream after one block replaced, all tokens; [] without labels
    levels: Levels
    beside: Beside | None = None  # a CLT
