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
    activation: float | None = Field(description="of a feature")


class CircuitGroup(BaseModel):
    """One feature at all tokens, or the errors of a layer, or all embeddings. Means are over all images: where it is
    not in the circuit it counts as 0."""

    kind: Literal["feature", "embedding", "error"]
    layer: int | None = Field(description="null for embeddings")
    index: int | None = Field(description="of a feature")
    label: str | None = None
    label_score: float | None = None
    images: int = Field(description="in whose circuits it is")
    tokens: float = Field(description="at which it is in the circuit: the mean over those images")
    influence: float = Field(description="on the target, over all paths: a share; the mean")
    contribution: float = Field(description="straight to the target, in logits; the mean")
    unfollowed_share: float | None = Field(
        description="of what flows into it (all |edges|), the part from features that were not followed back; "
        "null where nothing was followed"
    )
    where: list[GroupToken] = Field(description="its nodes, the most influential first; empty for many images")


class GroupEdge(BaseModel):
    source: int = Field(description="a place in `groups`")
    target: int | None = Field(description="a place in `groups`; null: the target's logit")
    weight: float = Field(description="summed over tokens; in units of the target's activation, or in logits; the mean")
    images: int = Field(description="in whose circuits it is")


class GroupedCircuit(BaseModel):
    """What the circuits of `images` images have in common; numbers are means over these images."""

    model: Model
    warnings: Warnings = []
    dictionary: Dictionary
    images: int
    targets: dict[str, int] = Field(description="label that was explained: images; most images first")
    contrast: str | None
    logit: float = Field(description="the target's; with a contrast, minus the contrast's")
    groups: list[CircuitGroup] = Field(description="the most influential first")
    edges: list[GroupEdge]
    unfollowed_share: float = Field(description="of what flows into the target, from features that were not followed")
    scores: CircuitScores
    nodes: float = Field(description="features at single tokens, embeddings and errors in the circuit")
    followed: float = Field(description="features whose sources were looked for")
    active: float = Field(description="active features: (layer, index, token)")
    kept: float = Field(description="features in the circuit")
    kept_share: float = Field(description="of the active features")
    layers: int
    rows: int = Field(description="of patches")
    columns: int
    failed: dict[str, int] = Field(default={}, description="images that cannot be used, by the service's code")
    unreadable: list[str] = Field(default=[], description="these images, with the reason")
    skipped: list[str] = Field(default=[], description="what else was left out of the inputs: a line for each reason")
