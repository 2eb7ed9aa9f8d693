"""A prediction without its account."""

from __future__ import annotations

from pydantic import BaseModel, Field, field_validator

from vitrine.service.schemas.base import AnswerShape, Labels, RequestShape, Strict, Templates, TimingsMs, WithImage
from vitrine.service.schemas.edits import EDIT


class LabelsRequest(RequestShape):
    """Labels and templates; without either, the bundle's own."""

    labels: Labels | None = Field(default=None, examples=[["cat", "dog", "truck"]])
    label_set: str | None = Field(default=None, description="a named label set; `default` is the bundle's")
    templates: Templates | None = Field(default=None, examples=[["a photo of a {}"]])
    strict: Strict = False
    top_k: int = Field(default=5, ge=1, strict=True, description="predictions listed, largest logit first")

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str] | None) -> list[str] | None:
        if labels and len(set(labels)) < len(labels):
            raise ValueError("labels must differ from one another")
        return labels


class ClassifyRequest(LabelsRequest):
    """The same, of CLIP or of an edited one."""

    edit: str | None = Field(default=None, description=EDIT)


class ClassifyJson(ClassifyRequest, WithImage):
    pass


class Prediction(BaseModel):
    label: str
    probability: float
    logit: float


class ClassifyResponse(AnswerShape):
    predictions: list[Prediction]
    timings_ms: TimingsMs
