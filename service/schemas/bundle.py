"""The bundle in service."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from vitrine.models.bundle.layout import Dictionary
from vitrine.models.interventions.spec import Mode
from vitrine.service.schemas.base import Model, Warnings
from vitrine.service.schemas.edits import EditSummary


class ModelResponse(BaseModel):
    """The bundle that is being served."""

    name: str
    digest: str
    provider: str
    precision: str
    manifest: dict[str, Any]
    source_baselines: list[Literal["zero", "mean"]] = Field(
        description="values that `explain.baseline` accepts; empty if the bundle does not support `explain.sources`"
    )
    attention_heads: int = Field(
        description="number of heads per layer that `explain.attention` accepts; 0 if the bundle does not support it"
    )
    circuit_dictionaries: list[Dictionary] = Field(
        description="values that `dictionary` of a circuit accepts; without residual, `explain.residual` is not "
        "supported"
    )
    interventions: list[Mode] = Field(
        description="values that `mode` of interventions accepts; empty if the bundle is from a version without "
        "interventions"
    )
    card_dictionaries: list[Dictionary] = Field(description="the dictionaries whose features have cards")

    edits: list[EditSummary] = Field(description="edits that a request may name in `edit`")
    default_edit: str | None = Field(
        description="the edit for requests that do not name one; null: the unmodified CLIP"
    )
    warnings: Warnings = []


class LabelSetResponse(BaseModel):
    name: str
    labels: list[str]
    templates: list[str]


class LabelsResponse(BaseModel):
    """The values of `label_set`. `default` is used for requests without labels."""

    model: Model
    label_sets: list[LabelSetResponse]
    warnings: Warnings = []


class ReloadResponse(BaseModel):
    """The bundle that is served from now on, and the one before it."""

    model: Model
    previous: Model
