"""A prediction and its account."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from vitrine.service.schemas.attention import AttentionAccount, HeadQuestion
from vitrine.service.schemas.base import AnswerShape, Label, Labels, RequestShape, TimingsMs, Warnings, WithImage
from vitrine.service.schemas.classify import ClassifyRequest, Prediction, Verdict
from vitrine.service.schemas.edits import EditUsed
from vitrine.service.schemas.residual import ResidualFeatures
from vitrine.service.schemas.sources import SourceAccount


class Explain(RequestShape):
    """What to explain, and in how much detail."""

    targets: Labels | None = Field(default=None, description="labels to explain; default: the top-1")
    contrast: Label | None = Field(default=None, description="explain each target's logit minus this label's")
    features: int = Field(
        default=5,
        ge=0,
        strict=True,
        description="number of features to list per layer, largest contribution first; in `residual` largest "
        "activation first",
    )
    heatmap: bool = Field(default=False, description="split each target's attention rows by patch and by head")
    lens: bool = Field(default=False, description="the prediction after each layer")
    matrix: bool = Field(default=False, description="which share of each layer's output each source layer writes")
    sources: bool = Field(
        default=False, description="follow each target's logit back through attention to the features that made it"
    )
    source_features: int = Field(
        default=12,
        ge=0,
        le=100_000,
        strict=True,
        description="number of features to list in `sources`, largest contribution first",
    )
    baseline: Literal["zero", "mean"] = Field(
        default="zero",
        description="baseline of `sources`; mean: the account shows what this image has and the average image does "
        "not have",
    )
    residual: bool = Field(
        default=False,
        description="list the most active features of the residual SAEs for each layer, at [CLS] and at patches",
    )
    attention: HeadQuestion | None = Field(
        default=None,
        description="explain why one head of one layer attends where it does",
        examples=[{"layer": 5, "head": 2}],
    )


class AttributeRequest(ClassifyRequest):
    explain: Explain = Field(default=Explain(), examples=[{"contrast": "dog", "features": 3, "heatmap": True}])


class AttributeJson(AttributeRequest, WithImage):
    pass


class LedgerAccount(BaseModel):
    """In logits. prior + sum(attention) + sum(clt) + bias + error + edit + remainder = logit.

    In a bundle without a CLT, prior + sum(attention) + sum(mlp) + bias + edit + remainder = logit.
    """

    prior: float
    attention: list[float] = Field(description="one number per layer")
    clt: list[float] = Field(description="one number per source layer; empty in a bundle without a CLT")
    mlp: list[float] | None = Field(
        default=None,
        description="one number per layer: what its MLP wrote. With a CLT sum(mlp) = sum(clt) + error + the decoders' "
        "biases, unless the network is edited. null in bundles of older versions",
    )
    bias: float
    error: float = Field(description="what the MLPs wrote and the CLT does not explain; 0 without a CLT")
    edit: float = Field(
        default=0.0, description="only after interventions: what removing directions added to the logit"
    )
    remainder: float = Field(description="rounding error")


class Feature(BaseModel):
    index: int
    activation: float = Field(description="never 0; negative only if the bundle's sparsifier is abs_topk")
    contribution: float = Field(description="in logits; all active features of a layer add up to its clt row")
    label: str | None = None
    label_score: float | None = None


class LayerAccount(BaseModel):
    layer: int
    contribution: float = Field(description="the layer's clt row, in logits; without a CLT its mlp row")
    share: float = Field(description="|contribution| divided by the sum of all |rows|")
    projection: float | None = Field(
        description="C_{i->L-1} on [CLS] (arXiv 2604.13304); the layers sum to 1, or are all 0; null without a CLT"
    )
    drop_effect: float = Field(description="change of the target's probability when this row is removed")
    features: list[Feature]


class HeatMap(BaseModel):
    """Where in the image the attention rows come from, in logits.

    sum(patches[l]) + class_token[l] + constant[l] = ledger.attention[l], up to rounding (a few thousandths
    for the int8 graph). sum(heads[l]) equals sum(patches[l]).
    """

    rows: int = Field(description="number of rows of patches")
    columns: int
    total: list[float] = Field(description="one number per patch, row by row: `patches` summed over layers")
    patches: list[list[float]] = Field(description="one list per layer with one number per patch, summed over heads")
    heads: list[list[float]] = Field(description="one list per layer with one number per head, summed over patches")
    class_token: list[float] = Field(description="one number per layer: what [CLS] took from itself")
    constant: list[float] = Field(description="one number per layer: the biases of attention")
    outliers: list[int] = Field(
        description="numbers of the patches whose residual is more than twice as long as the median; their position "
        "says little about the image"
    )


class LensLayer(BaseModel):
    """The prediction if the network ended after this layer: its [CLS] residual through ln_post and the projection."""

    layer: int
    label: str
    probability: float
    entropy: float = Field(description="entropy of the probabilities over all labels, in nats")


class Matrix(BaseModel):
    """C_{i->j} (arXiv 2604.13304): the share of target layer j's output that the features of source layer i write.

    One list per target layer with one number per source layer. They sum to 1, or are all 0 if no feature is active.
    """

    cls: list[list[float]] = Field(description="at [CLS]")
    patches: list[list[float]] = Field(description="mean over patches")


class Explanation(BaseModel):
    target: str
    contrast: str | None
    logit: float = Field(description="the target's logit; with a contrast, minus the contrast's logit")
    ledger: LedgerAccount
    layers: list[LayerAccount]
    heatmap: HeatMap | None = None
    sources: SourceAccount | None = None


class Fidelity(BaseModel):
    """How well the CLT's features represent what the MLPs did on this image."""

    r2: float = Field(
        description="R² of what the MLPs add to the embedding, measured around its mean over the training images"
    )
    cosine: float
    error_share: float = Field(description="|error row| divided by the sum of all |rows|, for the top-1 label")
    reconstructed_top1_agrees: bool = Field(
        description="whether the top-1 label stays the same when the error row is removed"
    )


class Attribution(BaseModel):
    """The prediction for one image, and its account."""

    edit: EditUsed | None = None
    warnings: Warnings = []
    predictions: list[Prediction]
    verdict: Verdict | None = Field(default=None, description="only with `scoring` independent")
    explanations: list[Explanation]
    lens: list[LensLayer] | None = None
    matrix: Matrix | None = None
    attention: AttentionAccount | None = None
    residual: ResidualFeatures | None = None
    fidelity: Fidelity | None = Field(description="null in a bundle without a CLT")
    timings_ms: TimingsMs


class AttributeResponse(Attribution, AnswerShape):
    pass
