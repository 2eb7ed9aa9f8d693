"""A prediction without its account."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from vitrine.service.schemas.base import (
    AnswerShape,
    Label,
    Labels,
    RequestShape,
    Strict,
    Templates,
    TimingsMs,
    WithImage,
)
from vitrine.service.schemas.edits import EDIT

Threshold = Annotated[float, Field(ge=-1, le=1, strict=True, allow_inf_nan=False)]


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
    scoring: Literal["softmax", "independent"] = Field(
        default="softmax",
        description="of probabilities: softmax shares 1 out among the labels; independent asks of each label for "
        "itself whether its cosine reaches `threshold`, so that it may be none of them",
    )
    threshold: Threshold | dict[Label, Threshold] | None = Field(
        default=None,
        description="of independent scoring: the cosine that a label must reach, one for all or one for each",
        examples=[0.25, {"cat": 0.24, "dog": 0.26}],
    )

    @model_validator(mode="after")
    def _has_threshold(self) -> Self:
        if self.scoring == "independent" and self.threshold is None:
            raise ValueError("`scoring` independent needs `threshold`: a cosine for all labels, or {label: cosine}")
        if self.scoring == "softmax" and self.threshold is not None:
            raise ValueError("`threshold` is of `scoring` independent; the softmax has none")
        return self


class ClassifyJson(ClassifyRequest, WithImage):
    pass


class Prediction(BaseModel):
    label: str
    probability: float = Field(description="by the softmax over all labels, or of this one for itself: see `scoring`")
    logit: float = Field(description="the cosine times the CLIP's logit scale")
    cosine: float = Field(description="of the image's and the label's embedding")


class Forced(BaseModel):
    """What the softmax puts first."""

    label: str
    probability: float


class Verdict(BaseModel):
    """Whether any of the labels fits: of all of them, listed under `predictions` or not."""

    above: list[str] = Field(description="labels whose cosine reaches their threshold, furthest above it first")
    none_of_these: bool = Field(description="no label does")
    softmax: Forced = Field(description="what the softmax names first: it always names one")


class ClassifyResponse(AnswerShape):
    predictions: list[Prediction]
    verdict: Verdict | None = Field(default=None, description="only with `scoring` independent")
    timings_ms: TimingsMs
