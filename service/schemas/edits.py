"""Edits: what answers and `/v1/model` say of them."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from vitrine.models.interventions.edit import Condition
from vitrine.models.interventions.spec import Mode

EDIT = "name of an edit; default: the service's (`default_edit` in `/v1/model`); none: the unmodified CLIP"


class EditUsed(BaseModel):
    """The edit that the request asked for."""

    name: str
    digest: str = Field(description="sha256 of the edit's content")
    mode: Mode
    applied: bool = Field(
        description="true: the answer is from the edited network; false: the edit's condition was not met, and the "
        "answer is from the unmodified CLIP. In a batch: true if this holds for any of its answers"
    )


class EditSummary(BaseModel):
    """An edit that requests may name."""

    name: str
    digest: str
    description: str
    created: datetime
    mode: Mode
    interventions: int = Field(description="number of interventions")
    condition: Condition | None
    signed: bool
    problem: str | None = Field(description="why this bundle cannot use the edit; null: it can")
