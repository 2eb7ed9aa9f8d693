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
    """What to explain, and how far."""

    targets: Labels | None = Field(default=None, description="labels to explain; default: the top-1")
    contrast: Label | None = Field(default=None, description="explain each target's logit minus this label's")
    features: int = Field(
        default=5,
        ge=0,
        strict=True,
        description="features listed per layer, largest contribution first; of `residual` largest activation first",
    )
    heatmap: bool = Field(default=False, description="split each target's attention rows by patch and by head")
    lens: bool = Field(default=False, description="the prediction as it stands after each layer")
    matrix: bool = Field(default=False, description="how much of each layer's output every source layer writes")
    sources: bool = Field(
        default=False, description="follow each target's logit back through attention to the features that made it"
    )
    source_features: int = Field(
        default=12,
        ge=0,
        le=100_000,
        strict=True,
        description="features listed in `sources`, largest contribution first",
    )
    baseline: Literal["zero", "mean"] = Field(
        default="zero", description="of `sources`: mean says what this picture has that the average one has not"
    )
    residual: bool = Field(
        default=False, description="the most active features of the residual SAEs by layer, at [CLS] and at patches"
    )
    attention: HeadQuestion | None = Field(
        default=None,
        description="why one head of one layer looks where it does",
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
    attention: list[float] = Field(description="one per layer")
    clt: list[float] = Field(description="one per source layer; empty in a bundle without a CLT")
    mlp: list[float] | None = Field(
        default=None,
        description="one per layer, what its MLP wrote; with a CLT sum(mlp) = sum(clt) + error + the decoders' biases, "
        "unless something is edited; null in bundles of older versions",
    )
    bias: float
    error: float = Field(description="what the MLPs did and the CLT does not say; 0 without a CLT")
    edit: float = Field(default=0.0, description="only after interventions: what taking directions out wrote")
    remainder: float = Field(description="rounding")


class Feature(BaseModel):
    index: int
    activation: float = Field(description="never 0; negative only where the bundle's sparsifier is abs_topk")
    contribution: float = Field(description="in logits; all active features of a layer sum to its clt row")
    label: str | None = None
    label_score: float | None = None


class LayerAccount(BaseModel):
    layer: int
    contribution: float = Field(description="the layer's clt row, in logits; without a CLT its mlp row")
    share: float = Field(description="|contribution| as a part of the sum of all |rows|")
    projection: float | None = Field(
        description="C_{i->L-1} on [CLS] (arXiv 2604.13304); the layers sum to 1, or are all 0; null without a CLT"
    )
    drop_effect: float = Field(description="change of the target's probability when this row is taken out")
    features: list[Feature]


class HeatMap(BaseModel):
    """Where in the image the attention rows come from, in logits.

    sum(patches[l]) + class_token[l] + constant[l] = ledger.attention[l], up to rounding (the int8 graph's: a few
    thousandths); sum(heads[l]) is sum(patches[l]) again.
    """

    rows: int = Field(description="of patches")
    columns: int
    total: list[float] = Field(description="one per patch, row by row: the sum over layers of `patches`")
    patches: list[list[float]] = Field(description="one list per layer, one number per patch, over all heads")
    heads: list[list[float]] = Field(description="one list per layer, one number per head, over all patches")
    class_token: list[float] = Field(description="one per layer: what [CLS] took from itself")
    constant: list[float] = Field(description="one per layer: attention's biases")
    outliers: list[int] = Field(
        description="patches, by number, whose residual is over twice as long as the median: their place says little"
    )


class LensLayer(BaseModel):
    """The prediction if the network ended after this layer: its [CLS] residual through ln_post and the projection."""

    layer: int
    label: str
    probability: float
    entropy: float = Field(description="of the probabilities over all labels, in nats")


class Matrix(BaseModel):
    """C_{i->j} (arXiv 2604.13304): what part of a target layer's output j the features of a source layer i write.

    A list per target layer with a number per source layer: they sum to 1, or are all 0 where no feature is active.
    """

    cls: list[list[float]] = Field(description="at [CLS]")
    patches: list[list[float]] = Field(description="in the mean over patches")


class Explanation(BaseModel):
    target: str
    contrast: str | None
    logit: float = Field(description="the target's logit; with a contrast, minus the contrast's")
    ledger: LedgerAccount
    layers: list[LayerAccount]
    heatmap: HeatMap | None = None
    sources: SourceAccount | None = None


class Fidelity(BaseModel):
    """How far the CLT's features stand for what the MLPs did, on this image."""

    r2: float = Field(description="of what the MLPs add to the embedding, about its mean over the training images")
    cosine: float
    error_share: float = Field(description="|error row| as a part of the sum of all |rows|, for the top-1 label")
    reconstructed_top1_agrees: bool = Field(description="the top-1 stays when the error row is taken out")


class Attribution(BaseModel):
    """The prediction of one image, and the account of it."""

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
