"""results.json: everything that `vitrine evaluate` measures. Accuracies and shares lie between 0 and 1.

Lists by layer start at layer 0. Matrices are [target layer j][source layer i]. An interval contains 95 % of the
bootstrap resamples over images; differences are paired by image.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict

from vitrine.models.account.windows import Tokens
from vitrine.models.bootstrap import Estimate
from vitrine.models.bundle.manifest import ClipIdentity
from vitrine.training.recipes.recipe import CltRecipe, ResidualSaeRecipe

FORMAT = 1
Matrix = list[list[float]]


class Part(BaseModel):
    """Of results.json: immutable, and no fields that are not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def if_known(estimate: Estimate) -> Estimate | None:
    """None for a figure that is not known (NaN): of images without classes no prediction is right or wrong."""
    return None if math.isnan(estimate.value) else estimate


class Spread(Part):
    """A figure over several random orders."""

    mean: float
    deviation: float  # standard deviation over the orders
    lowest: float
    highest: float


class LayerFigures(Part):
    """The CLT's output for one layer compared with the MLP's."""

    mse: float  # per token and dimension
    r2: float  # variance-weighted: 1 - sum |y - y'|^2 / sum |y - mean y|^2
    r2_kept: float | None  # over the tokens that are no outliers; None: there are not two
    outliers: float  # share of tokens longer than three times the median of the layer's tokens
    relative_error: float  # median of |y - y'| / |y|
    cosine: float
    l0: float  # active features per token
    dead_share: float  # features that fired for no token of this type


class TokenFigures(Part):
    """Means over layers (over those that have the figure), and the figures of each layer."""

    r2: Estimate
    r2_kept: float | None
    outliers: float
    relative_error: float
    mse: float
    cosine: float
    l0: float
    dead_share: float
    layers: list[LayerFigures]

    @property
    def mean(self) -> LayerFigures:
        return LayerFigures(r2=self.r2.value, **self.model_dump(exclude={"r2", "layers"}))

    @property
    def worst(self) -> LayerFigures:
        """Of each figure, that of the layer where it is worst; the most outliers; L0 has no worse and better."""
        lowest = {"r2": min(layer.r2 for layer in self.layers), "cosine": min(layer.cosine for layer in self.layers)}
        kept = [layer.r2_kept for layer in self.layers if layer.r2_kept is not None]
        highest = {
            name: max(getattr(layer, name) for layer in self.layers)
            for name in ("mse", "relative_error", "outliers", "dead_share", "l0")
        }
        return LayerFigures(**lowest, r2_kept=min(kept, default=None), **highest)


class Cascade(Part):
    """Zero-shot top-1 with the MLPs of the layers `first` to `last` replaced."""

    first: int
    last: int
    tokens: Tokens
    top1: Estimate | None  # None: the images have no classes
    difference: Estimate | None  # from CLIP's own top-1
    agreement: Estimate  # share of images with the same prediction as CLIP
    divergence: Estimate  # Kullback-Leibler, from CLIP's own zero-shot distribution, nats

    @property
    def window(self) -> str:
        return f"{self.first}–{self.last}"


class Contributions(Part):
    """C_{i->j} as in `training.evaluation.contributions`."""

    raw: Matrix
    centred: Matrix


class Curve(Part):
    """Zero-shot top-1 with the k best-ranked source layers of the last target layer kept, or dropped; k = 0 ... L.

    None: the images have no classes.
    """

    ranking: Literal["cls", "all", "image"]  # by C over the data set, at [CLS] or at all tokens; or per image
    order: list[int] | None  # source layers, largest C first; None: each image has its own order
    keep: list[Estimate] | None
    drop: list[Estimate] | None
    keep_divergence: list[float]  # mean Kullback-Leibler divergence from CLIP's own zero-shot distribution, nats
    drop_divergence: list[float]
    keep_top4: Estimate | None  # differences from CLIP's own top-1
    drop_top1: Estimate | None


class Faithfulness(Part):
    """The last target layer at [CLS], rebuilt from a subset of its source layers; the bias is always kept.

    Without classes of the images there are divergences alone; the other lists are empty.
    """

    curves: list[Curve]
    random_orders: int
    random_keep: list[Spread]
    random_drop: list[Spread]
    random_keep_divergence: list[Spread]
    random_drop_divergence: list[Spread]
    drop_one: list[Estimate]  # one source layer dropped, by layer
    drop_one_mean: Estimate | None  # mean over layers: the effect of dropping a random layer
    drop_one_divergence: list[float]

    def curve(self, ranking: str) -> Curve:
        return next(curve for curve in self.curves if curve.ranking == ranking)

    def harm_in_top1(self, ranking: str) -> float | None:
        """Ratio of the falls in top-1, relative to all layers kept: dropping the top layer over dropping any one layer
        (mean); None if the latter does not lower top-1, or there is none."""
        dropped = self.curve(ranking).drop
        if dropped is None or self.drop_one_mean is None:
            return None
        full, without_first = dropped[0].value, dropped[1].value
        return _ratio(full - without_first, full - self.drop_one_mean.value)

    def harm_in_divergence(self, ranking: str) -> float | None:
        """The same for the divergence from CLIP's own distribution, which does not jump when one prediction flips."""
        full, without_first = self.curve(ranking).drop_divergence[:2]
        return _ratio(without_first - full, sum(self.drop_one_divergence) / len(self.drop_one_divergence) - full)


class NodePoint(Part):
    """Means over images, with some nodes at their usual values."""

    above_mean: Estimate  # top-1's logit less the mean over labels, as a share of its value with nothing taken away
    logit: float  # of the image's own top-1
    probability: float
    stays: float  # share of images whose top-1 is still the same


class NodeCurve(Part):
    """One ranking of the nodes of each image (`training.evaluation.rankings` of a CLT's features,
    `training.evaluation.residual_nodes`), by fraction of the active ones."""

    ranking: str
    active: float  # nodes of an image, mean
    deletion: list[NodePoint]  # the best-ranked at their usual values
    insertion: list[NodePoint]  # all others at their usual values
    deletion_area: Estimate  # of `above_mean`, the fractions equally spaced
    insertion_area: Estimate
    regained: Estimate  # by insertion of 2 %: share of the way from everything at its usual value to nothing
    at_nodes: NodePoint  # deletion of so many nodes


class NodeFaithfulness(Part):
    """Insertion and deletion of nodes in the running network (`training.evaluation.curves`)."""

    images: int
    medians: int = 0  # images of the medians that are usual; 0: means over the val images are
    fractions: list[float]
    nodes: int
    above_mean: float  # top-1's logit less the mean over labels, with nothing taken away
    curves: list[NodeCurve]

    def curve(self, ranking: str) -> NodeCurve:
        return next(curve for curve in self.curves if curve.ranking == ranking)


class Neighbours(Part):
    """An example: the images nearest to a query, by layer. Images are indices into the data set."""

    query: int
    label: str
    layers: list[list[int]]  # [L][k]
    labels: list[list[str]]  # [L][k]


class Retrieval(Part):
    """Share of the `k` nearest images, by sparse code at [CLS], with the query's class."""

    k: int
    queries: int
    layers: list[Estimate]
    embedding: Estimate  # the same share by CLIP's own embedding
    chance: float
    examples: list[Neighbours]


class Comparison(Part):
    """Another CLT on the same images: the per-layer transcoders."""

    name: str  # of the run's folder
    checkpoint_sha256: str
    cross_layer: bool
    reconstruction: dict[Tokens, TokenFigures]
    cascades: list[Cascade]
    gains: list[Estimate | None]  # top-1 of the evaluated CLT minus top-1 of this one, by cascade


class Seeds(Part):
    sample: int
    bootstrap: int
    orders: int


class AnyResults(Part):
    """What is measured of a dictionary of either kind."""

    format: int = FORMAT
    recipe: CltRecipe | ResidualSaeRecipe
    clip: ClipIdentity
    checkpoint_sha256: str  # of the dictionary's weights
    step: int
    layers: int
    images: int
    labels: list[str]  # [] if there are none: nothing is predicted then
    left_out: list[str] = []  # what could not be measured, and why
    seeds: Seeds
    resamples: int
    confidence: float
    reconstruction: dict[Tokens, TokenFigures]
    baseline: Estimate | None  # zero-shot top-1 of CLIP itself; None: the images have no classes, or no labels
    cascades: list[Cascade]  # [] without labels
    nodes: NodeFaithfulness | None = None  # None: not asked for, or no labels

    def cascade(self, first: int, last: int, tokens: Tokens) -> Cascade:
        return next(c for c in self.cascades if (c.first, c.last, c.tokens) == (first, last, tokens))


class Results(AnyResults):
    """Of a Cross-Layer Transcoder."""

    recipe: CltRecipe
    contributions: dict[Tokens, Contributions]
    faithfulness: Faithfulness | None  # None: no labels
    retrieval: Retrieval | None  # None: too few images, or without classes
    comparison: Comparison | None = None


def _ratio(first: float, any_one: float) -> float | None:
    return first / any_one if any_one > 0 else None
