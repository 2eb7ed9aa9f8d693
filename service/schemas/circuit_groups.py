"""A circuit summed over tokens, of one image, or the mean of many images' circuits."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from vitrine.models.bundle.layout import Dictionary
from vitrine.service.schemas.base import Model, Warnings
from vitrine.service.schemas.circuit import CircuitScores


class GroupToken(BaseModel):
    """One node of a group."""

    token: int = Field(description="0: [CLS], then the patches row by row")
    influence: float
    activation: float | None = Field(description="activation of a feature; null for others")


class CircuitGroup(BaseModel):
    """One feature at all tokens, or the errors of a layer, or all embeddings. Means are over all images: an image
    without it in its circuit counts as 0."""

    kind: Literal["feature", "embedding", "error"]
    layer: int | None = Field(description="null for embeddings")
    index: int | None = Field(description="index of the feature; null for others")
    label: str | None = None
    label_score: float | None = None
    images: int = Field(description="number of images with it in their circuits")
    tokens: float = Field(description="number of tokens at which it is in the circuit: the mean over those images")
    influence: float = Field(description="share of the influence on the target, over all paths; the mean")
    contribution: float = Field(description="direct contribution to the target, in logits; the mean")
    unfollowed_share: float | None = Field(
        description="share of what flows into it (all |edges|) that comes from features that were not followed back; "
        "null if it was not followed"
    )
    where: list[GroupToken] = Field(description="its nodes, most influential first; empty for the mean of many images")


class GroupEdge(BaseModel):
    source: int = Field(description="position in `groups`")
    target: int | None = Field(description="position in `groups`; null: the target's logit")
    weight: float = Field(
        description="summed over tokens, in units of the activation of the edge's target or in logits; the mean"
    )
    images: int = Field(description="number of images with it in their circuits")


class GroupedCircuit(BaseModel):
    """What the circuits of `images` images have in common; numbers are means over these images."""

    model: Model
    warnings: Warnings = []
    dictionary: Dictionary
    images: int
    targets: dict[str, int] = Field(description="number of images for each label that was explained, most images first")
    contrast: str | None
    logit: float = Field(description="the target's logit; with a contrast, minus the contrast's logit")
    groups: list[CircuitGroup] = Field(description="most influential first")
    edges: list[GroupEdge]
    unfollowed_share: float = Field(
        description="share of what flows into the target that comes from features that were not followed"
    )
    scores: CircuitScores
    nodes: float = Field(description="number of nodes in the circuit: features at single tokens, embeddings and errors")
    followed: float = Field(description="number of features whose sources were searched for")
    active: float = Field(description="number of active features, each counted by (layer, index, token)")
    kept: float = Field(description="number of features in the circuit")
    kept_share: float = Field(description="`kept` divided by `active`")
    layers: int
    rows: int = Field(description="number of rows of patches")
    columns: int
    failed: dict[str, int] = Field(default={}, description="number of images that cannot be used, by error code")
    unreadable: list[str] = Field(default=[], description="those images, each with the reason")
    skipped: list[str] = Field(default=[], description="what else was left out of the inputs, one line per reason")
