"""Edits: what answers and `/v1/model` say of them."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from vitrine.models.interventions.edit import Condition
from vitrine.models.interventions.spec import Mode

EDIT = "an edit by its name; default: the service's (`default_edit` of `/v1/model`); none: CLIP as it is"


class EditUsed(BaseModel):
    """The edit that an answer was asked for with."""

    name: str
    digest: str = Field(description="sha256 of all that the edit says")
    mode: Mode
    applied: bool = Field(
        description="whether the answer is the edited network's; false: the edit's condition was not met, and it is "
        "CLIP's own. Of a batch: whether any of its answers is"
    )


class EditSummary(BaseModel):
    """An edit that requests may name."""

    name: str
    digest: str
    description: str
    created: datetime
    mode: Mode
    interventions: int = Field(description="how many")
    condition: Condition | None
    signed: bool
    problem: str | None = Field(description="why it cannot be used here; null: it can")
