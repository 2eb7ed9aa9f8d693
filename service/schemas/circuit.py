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
        description="the dictionary of the features. clt: features of the CLT, each made by any layer below it; "
        "residual: features of the residual SAEs, each made by the one layer below it",
    )
    target: Label | None = Field(default=None, description="the label to explain; default: the top-1")
    contrast: Label | None = Field(default=None, description="explain the target's logit minus this label's")
    nodes: int | None = Field(
        default=None,
        ge=0,
        strict=True,
        description="maximum number of features to follow back, the most influential first; default: 256 of a CLT, "
        "2,048 of residual SAEs, or the service's limit if that is lower",
    )
    seconds: float = Field(
        default=5,
        gt=0,
        le=600,
        allow_inf_nan=False,
        description="time limit for following features back; the share of influence that is not reached is reported",
    )
    node_share: float = Field(
        default=0.8,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="share of all influence that the nodes in the answer must cover",
    )
    edge_share: float = Field(
        default=0.98,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="share of the influence of the edges between these nodes that the edges in the answer must cover",
    )
    leaves: bool = Field(
        default=False,
        strict=True,
        description="also list features that were not followed back as nodes; otherwise each node's `inflow` has "
        "their sum",
    )


class CircuitJson(CircuitRequest, WithImage):
    pass


class CircuitInflow(BaseModel):
    """What flows into a node, or into the target, other than along the listed edges. These edges, `unfollowed`,
    `pruned` and `constant` add up to its activation, or to the logit."""

    unfollowed: float = Field(description="from features that were not followed back")
    unfollowed_share: float = Field(
        description="|edges| from those features divided by the sum of all |edges| into the node"
    )
    pruned: float = Field(description="from followed features, embeddings and errors that were pruned")
    pruned_share: float
    constant: float = Field(description="biases and constants")


class CircuitNode(BaseModel):
    kind: Literal["feature", "embedding", "error"]
    layer: int | None = Field(description="null for an embedding")
    index: int | None = Field(description="index of the feature; null for other nodes")
    token: int = Field(description="0: [CLS], then the patches row by row")
    influence: float = Field(description="share of the influence on the target, over all paths")
    contribution: float = Field(
        description="direct contribution to the target, in logits: its part of the source account"
    )
    activation: float | None = Field(
        description="activation of a feature: the sum of everything that flows into it (see `inflow`); null for other "
        "nodes"
    )
    followed: bool = Field(description="whether its own sources were searched for; if not, the circuit ends here")
    inflow: CircuitInflow | None = Field(description="null if the node was not followed")
    label: str | None = None
    label_score: float | None = None


class CircuitEdge(BaseModel):
    source: int = Field(description="position in `nodes`")
    target: int | None = Field(description="position in `nodes`; null: the target's logit")
    weight: float = Field(description="in units of the activation of the edge's target, or in logits")


class CircuitScores(BaseModel):
    """The influence on the target by where paths end (the first four sum to 1), and two scores of circuit-tracer."""

    embeddings: float
    errors: float = Field(
        description="what MLPs wrote and the CLT does not explain, or what is in the stream and the residual SAEs do "
        "not explain"
    )
    left_out: float = Field(description="features that were not followed back")
    constant: float = Field(description="features that only biases and constants made")
    replacement: float = Field(description="embeddings / (embeddings + errors)")
    completeness: float = Field(
        description="share of what flows into the nodes, weighted by influence, that does not come from errors"
    )


class CircuitResponse(AnswerShape):
    """The pruned attribution graph of one logit. Attention weights and LayerNorms' denominators are held constant; with
    residual SAEs, the MLPs' gates too."""

    dictionary: Dictionary
    predictions: list[Prediction]
    target: str
    contrast: str | None
    logit: float = Field(description="the target's logit; with a contrast, minus the contrast's logit")
    nodes: list[CircuitNode] = Field(description="most influential first")
    edges: list[CircuitEdge]
    inflow: CircuitInflow = Field(description="inflow of the target")
    scores: CircuitScores
    followed: int = Field(description="number of features whose sources were searched for")
    active: int = Field(description="number of active features, each counted by (layer, index, token)")
    kept: int = Field(description="number of features in `nodes`")
    kept_share: float = Field(description="`kept` divided by `active`")
    layers: int = Field(description="number of layers of the dictionary: that of the CLIP, or one less")
    rows: int = Field(description="number of rows of patches")
    columns: int
    timings_ms: TimingsMs
