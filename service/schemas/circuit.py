"""A circuit: which features made the features that made a logit."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from vitrine.models.bundle.layout import Dictionary
from vitrine.service.schemas.base import AnswerShape, Label, TimingsMs, WithImage
from vitrine.service.schemas.classify import LabelsRequest, Prediction


class CircuitRequest(LabelsRequest):
    dictionary: Dictionary = Field(
        default="clt",
        description="whose features: of the CLT, which any layer below made, or of the residual SAEs, which the one "
        "layer below made",
    )
    target: Label | None = Field(default=None, description="the label to explain; default: the top-1")
    contrast: Label | None = Field(default=None, description="explain the target's logit minus this label's")
    nodes: int | None = Field(
        default=None,
        ge=0,
        strict=True,
        description="features at most that are followed back, the most influential first; default: 256 of a CLT's, "
        "2,048 of residual SAEs', or as many as the service allows",
    )
    seconds: float = Field(
        default=5, gt=0, le=600, allow_inf_nan=False, description="for that; what is not reached is told as a share"
    )
    node_share: float = Field(
        default=0.8, gt=0, le=1, allow_inf_nan=False, description="of all influence that the nodes of the answer have"
    )
    edge_share: float = Field(
        default=0.98,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="of the edges' influence between these nodes, likewise",
    )
    leaves: bool = Field(
        default=False,
        strict=True,
        description="list features that were not followed back as nodes, too; else each node's `inflow` has their sum",
    )


class CircuitJson(CircuitRequest, WithImage):
    pass


class CircuitInflow(BaseModel):
    """What flows into a node, or into the target, beside the listed edges. These edges, `unfollowed`, `pruned` and
    `constant` add up to its activation, or to the logit."""

    unfollowed: float = Field(description="from features that were not followed back")
    unfollowed_share: float = Field(description="their part of the sum of all |edges| into it")
    pruned: float = Field(description="from followed features, embeddings and errors that were pruned")
    pruned_share: float
    constant: float = Field(description="biases and constants")


class CircuitNode(BaseModel):
    kind: Literal["feature", "embedding", "error"]
    layer: int | None = Field(description="null for an embedding")
    index: int | None = Field(description="of a feature")
    token: int = Field(description="0: [CLS], then the patches row by row")
    influence: float = Field(description="on the target, over all paths: a share")
    contribution: float = Field(description="straight to the target, in logits: its part of the source account")
    activation: float | None = Field(description="of a feature: all that flows into it adds up to it (`inflow`)")
    followed: bool = Field(description="whether its own sources were looked for; others end the circuit")
    inflow: CircuitInflow | None = Field(description="null where it was not followed")
    label: str | None = None
    label_score: float | None = None


class CircuitEdge(BaseModel):
    source: int = Field(description="a place in `nodes`")
    target: int | None = Field(description="a place in `nodes`; null: the target's logit")
    weight: float = Field(description="in units of the target's activation, or in logits")


class CircuitScores(BaseModel):
    """The target's influence by where it ends (the first four sum to 1), and two scores of circuit-tracer."""

    embeddings: float
    errors: float = Field(
        description="what MLPs wrote and the CLT does not say, or what the stream has and the residual SAEs do not say"
    )
    left_out: float = Field(description="features that were not followed back")
    constant: float = Field(description="features that biases and constants alone made")
    replacement: float = Field(description="embeddings / (embeddings + errors)")
    completeness: float = Field(description="share of what flows into the nodes, by influence, that no error made")


class CircuitResponse(AnswerShape):
    """The attribution graph of one logit, pruned. Attention weights and LayerNorms' denominators are held fast, by
    residual SAEs the MLPs' gates, too."""

    dictionary: Dictionary
    predictions: list[Prediction]
    target: str
    contrast: str | None
    logit: float = Field(description="the target's; with a contrast, minus the contrast's")
    nodes: list[CircuitNode] = Field(description="the most influential first")
    edges: list[CircuitEdge]
    inflow: CircuitInflow = Field(description="of the target")
    scores: CircuitScores
    followed: int = Field(description="features whose sources were looked for")
    active: int = Field(description="active features: (layer, index, token)")
    kept: int = Field(description="features in `nodes`")
    kept_share: float = Field(description="of the active features")
    layers: int = Field(description="of the dictionary: those of the CLIP, or one less")
    rows: int = Field(description="of patches")
    columns: int
    timings_ms: TimingsMs
