"""Interventions: a prediction and its account before and after, and what would have to go for another prediction."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from vitrine.models.interventions.spec import Intervention, Mode
from vitrine.service.schemas.attribute import Attribution, Explanation, Fidelity, LedgerAccount
from vitrine.service.schemas.base import AnswerShape, Label, Labels, RequestShape, TimingsMs, WithImage
from vitrine.service.schemas.classify import LabelsRequest, Prediction

Edits = Annotated[list[Intervention], Field(fail_fast=True)]


class InterveneExplain(RequestShape):
    """What to explain before and after: the fields of `/v1/attribute`'s `explain` that can be told of both."""

    targets: Labels | None = Field(default=None, description="labels to explain; default: the top-1 before")
    contrast: Label | None = Field(default=None, description="explain each target's logit minus this label's")
    features: int = Field(default=5, ge=0, strict=True, description="features listed per layer; and per difference")
    sources: bool = Field(default=False, description="source accounts too, of `before` alone")
    source_features: int = Field(default=12, ge=0, le=100_000, strict=True, description="features listed in `sources`")
    baseline: Literal["zero", "mean"] = Field(default="zero", description="of `sources`")


class Counterfactual(RequestShape):
    """Which few features, or patches, would have to go for another label to come first."""

    label: Label
    of: Literal["features", "patches"] = Field(
        default="features",
        description="features of the CLT, ablated at all tokens of the running network; or patches, painted over with "
        "the mean colour",
    )
    members: int = Field(default=32, ge=1, strict=True, description="features or patches taken out at most")
    seconds: float = Field(default=10, gt=0, le=600, allow_inf_nan=False, description="for the search")


class InterveneRequest(LabelsRequest):
    edits: Edits = Field(
        default=[], description="made together", examples=[[{"op": "ablate", "layer": 2, "index": 17}]]
    )
    variants: Annotated[list[Edits], Field(min_length=1)] | None = Field(
        default=None, description="instead of `edits`: several lists of them, each made for itself"
    )
    counterfactual: Counterfactual | Label | None = Field(
        default=None, description="instead of `edits`: the label that should come first", examples=["dog"]
    )
    mode: Mode = Field(
        default="direct",
        description="direct: [CLS]'s final residual is changed, what later layers would make of it is left out; rerun: "
        "the network runs again with the changes in it",
    )
    explain: InterveneExplain = InterveneExplain()

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        asked = [name for name in ("edits", "variants", "counterfactual") if getattr(self, name)]
        if len(asked) > 1:
            raise ValueError(f"ask for one of {' and '.join(asked)} at a time")
        return self


class InterveneJson(InterveneRequest, WithImage):
    pass


class After(BaseModel):
    """What /v1/attribute would say of the changed network. Targets are those of `before`."""

    predictions: list[Prediction]
    explanations: list[Explanation]
    fidelity: Fidelity | None = Field(description="null in a bundle without a CLT")


class ProbabilityChange(BaseModel):
    label: str
    before: float
    after: float


class FeatureChange(BaseModel):
    """A feature at [CLS] that contributes more or less than it did."""

    layer: int
    index: int
    activation_before: float
    activation_after: float
    contribution: float = Field(description="after minus before, in logits")
    label: str | None = None
    label_score: float | None = None


class ExplanationChange(BaseModel):
    """After minus before, in logits."""

    target: str
    contrast: str | None
    logit: float
    ledger: LedgerAccount
    features: list[FeatureChange] = Field(
        description="the largest |contribution| first; at most `explain.features` times the layers"
    )


class Difference(BaseModel):
    top1_changes: bool
    probabilities: list[ProbabilityChange] = Field(description="of every label among the predictions before or after")
    explanations: list[ExplanationChange] = Field(description="one per target")


class Variant(BaseModel):
    """What one list of interventions makes of the image."""

    edits: list[Intervention]
    after: After
    difference: Difference


class Member(BaseModel):
    """A feature, or a patch, that is taken out."""

    layer: int | None = Field(description="of a feature")
    index: int | None = Field(description="of a feature")
    token: int | None = Field(description="of a patch: 1 is the first, row by row")
    label: str | None = None
    label_score: float | None = None


class Step(BaseModel):
    """The prediction with all members so far taken out, by a run of the network."""

    member: Member
    top1: str
    probability: float = Field(description="of the label asked for")
    lead: float = Field(description="its logit minus the largest other one's: above 0 it comes first")


class CounterfactualAnswer(BaseModel):
    """Members that suffice for the label to come first; whether fewer would is not known, but for `minimal`."""

    label: str
    of: Literal["features", "patches"]
    found: bool
    stopped: Literal["members", "seconds", "nothing left"] | None = Field(
        description="why none was found: the bounds, or nothing listed argues against the label any more"
    )
    members: list[Member] = Field(description="with these taken out the label comes first; empty if it does anyway")
    minimal: bool = Field(description="whether taking out all but any one of them was tried, and does not suffice")
    path: list[Step] = Field(description="one for each that was tried, most against the label first")
    rows: int = Field(description="of patches")
    columns: int


class InterveneResponse(AnswerShape):
    """A prediction and its account, before and after interventions."""

    mode: Mode
    before: Attribution = Field(description="what /v1/attribute answers")
    results: list[Variant] = Field(
        description="one for `edits`, one for each of `variants`; of a counterfactual the one that was found, if it was"
    )
    counterfactual: CounterfactualAnswer | None = None
    timings_ms: TimingsMs
