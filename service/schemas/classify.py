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
    """Labels and templates; by default the bundle's own."""

    labels: Labels | None = Field(default=None, examples=[["cat", "dog", "truck"]])
    label_set: str | None = Field(default=None, description="the name of a label set; `default` is the bundle's own")
    templates: Templates | None = Field(default=None, examples=[["a photo of a {}"]])
    strict: Strict = False
    top_k: int = Field(default=5, ge=1, strict=True, description="number of predictions to list, largest logit first")

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str] | None) -> list[str] | None:
        if labels and len(set(labels)) < len(labels):
            raise ValueError("labels must differ from one another; send each label once")
        return labels


class ClassifyRequest(LabelsRequest):
    """Labels and templates, for the unmodified CLIP or an edited one, with the way of scoring."""

    edit: str | None = Field(default=None, description=EDIT)
    scoring: Literal["softmax", "independent"] = Field(
        default="softmax",
        description="how labels are scored. softmax: probabilities sum to 1 over all labels. independent: each label "
        "is accepted on its own if its cosine reaches `threshold`; possibly none is",
    )
    threshold: Threshold | dict[Label, Threshold] | None = Field(
        default=None,
        description="for `scoring` independent: the cosine that a label must reach; one number for all labels, or one "
        "per label",
        examples=[0.25, {"cat": 0.24, "dog": 0.26}],
    )

    @model_validator(mode="after")
    def _has_threshold(self) -> Self:
        if self.scoring == "independent" and self.threshold is None:
            raise ValueError(
                "`scoring` independent requires `threshold`: one cosine for all labels, or {label: cosine}"
            )
        if self.scoring == "softmax" and self.threshold is not None:
            raise ValueError(
                "`threshold` can only be used with `scoring` independent; leave it out, or set `scoring` to independent"
            )
        return self


class ClassifyJson(ClassifyRequest, WithImage):
    pass


class Prediction(BaseModel):
    label: str
    probability: float = Field(
        description="from the softmax over all labels, or for this label on its own: see `scoring`"
    )
    logit: float = Field(description="the cosine multiplied by the CLIP's logit scale")
    cosine: float = Field(description="cosine of the image's embedding and the label's embedding")


class Forced(BaseModel):
    """The label that the softmax ranks first."""

    label: str
    probability: float


class Verdict(BaseModel):
    """Whether any label fits. All labels count, also those not listed in `predictions`."""

    above: list[str] = Field(description="labels whose cosine reaches their threshold, the one furthest above it first")
    none_of_these: bool = Field(description="true if no label reaches its threshold")
    softmax: Forced = Field(description="the label that the softmax ranks first; the softmax always names one")


class ClassifyResponse(AnswerShape):
    predictions: list[Prediction]
    verdict: Verdict | None = Field(default=None, description="only with `scoring` independent")
    timings_ms: TimingsMs
