"""The bundle in service."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from vitrine.models.interventions.spec import Mode
from vitrine.service.schemas.base import Model, Warnings
from vitrine.service.schemas.circuit import Dictionary


class ModelResponse(BaseModel):
    """The bundle that is being served."""

    name: str
    digest: str
    provider: str
    precision: str
    manifest: dict[str, Any]
    source_baselines: list[Literal["zero", "mean"]] = Field(
        description="what `explain.baseline` may be; empty where there is no `explain.sources`"
    )
    attention_heads: int = Field(description="of a layer, that `explain.attention` may name; 0 where there is none")
    circuit_dictionaries: list[Dictionary] = Field(
        description="what `dictionary` of a circuit may be; without residual there is no `explain.residual`"
    )
    interventions: list[Mode] = Field(
        description="what `mode` of interventions may be; empty where the bundle was exported before there were any"
    )
    warnings: Warnings = []


class LabelSetResponse(BaseModel):
    name: str
    labels: list[str]
    templates: list[str]


class LabelsResponse(BaseModel):
    """What `label_set` may name. `default` is what a request without labels gets."""

    model: Model
    label_sets: list[LabelSetResponse]
    warnings: Warnings = []


class ReloadResponse(BaseModel):
    """The bundle that is served from now on, and the one before it."""

    model: Model
    previous: Model
