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
    """What to explain before and after: the fields of `explain` in `/v1/attribute` that apply to both."""

    targets: Labels | None = Field(
        default=None, description="labels to explain; default: the top-1 label before the interventions"
    )
    contrast: Label | None = Field(default=None, description="explain each target's logit minus this label's")
    features: int = Field(
        default=5, ge=0, strict=True, description="number of features to list per layer, and per difference"
    )
    sources: bool = Field(default=False, description="also make source accounts, only of `before`")
    source_features: int = Field(
        default=12, ge=0, le=100_000, strict=True, description="number of features to list in `sources`"
    )
    baseline: Literal["zero", "mean"] = Field(default="zero", description="baseline of `sources`")


class Counterfactual(RequestShape):
    """Which few features or patches must be removed for another label to come first."""

    label: Label
    of: Literal["features", "patches"] = Field(
        default="features",
        description="features: features of the CLT, ablated at all tokens while the network runs; patches: patches of "
        "the image, painted over with the mean colour",
    )
    members: int = Field(default=32, ge=1, strict=True, description="maximum number of features or patches to remove")
    seconds: float = Field(default=10, gt=0, le=600, allow_inf_nan=False, description="time limit of the search")


class InterveneRequest(LabelsRequest):
    edits: Edits = Field(
        default=[], description="interventions to make together", examples=[[{"op": "ablate", "layer": 2, "index": 17}]]
    )
    variants: Annotated[list[Edits], Field(min_length=1)] | None = Field(
        default=None, description="instead of `edits`: several lists of interventions, each made separately"
    )
    counterfactual: Counterfactual | Label | None = Field(
        default=None, description="instead of `edits`: the label that should come first", examples=["dog"]
    )
    mode: Mode = Field(
        default="direct",
        description="direct: the final residual at [CLS] is changed, and what later layers would make of the change "
        "is left out; rerun: the network runs again with the changes in it",
    )
    explain: InterveneExplain = InterveneExplain()

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        asked = [name for name in ("edits", "variants", "counterfactual") if getattr(self, name)]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} cannot be used together; send one of them")
        return self


class InterveneJson(InterveneRequest, WithImage):
    pass


class After(BaseModel):
    """What /v1/attribute would answer for the changed network. The targets are those of `before`."""

    predictions: list[Prediction]
    explanations: list[Explanation]
    fidelity: Fidelity | None = Field(description="null in a bundle without a CLT")


class ProbabilityChange(BaseModel):
    label: str
    before: float
    after: float


class FeatureChange(BaseModel):
    """A feature at [CLS] that contributes more or less than before."""

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
        description="largest |contribution| first; at most `explain.features` times the number of layers"
    )


class Difference(BaseModel):
    top1_changes: bool
    probabilities: list[ProbabilityChange] = Field(description="one item per label in the predictions before or after")
    explanations: list[ExplanationChange] = Field(description="one item per target")


class Variant(BaseModel):
    """The result of one list of interventions."""

    edits: list[Intervention]
    after: After
    difference: Difference


class Member(BaseModel):
    """A feature or a patch that is removed."""

    layer: int | None = Field(description="layer of the feature")
    index: int | None = Field(description="index of the feature")
    token: int | None = Field(description="number of the patch: 1 is the first, row by row")
    label: str | None = None
    label_score: float | None = None


class Step(BaseModel):
    """The prediction of a run of the network with all members so far removed."""

    member: Member
    top1: str
    probability: float = Field(description="probability of the requested label")
    lead: float = Field(description="its logit minus the largest other logit; above 0 it comes first")


class CounterfactualAnswer(BaseModel):
    """Members whose removal makes the label come first. Fewer may be enough: see `minimal`."""

    label: str
    of: Literal["features", "patches"]
    found: bool
    stopped: Literal["members", "seconds", "nothing left"] | None = Field(
        description="why no solution was found: a limit was reached, or nothing listed argues against the label any "
        "more"
    )
    members: list[Member] = Field(
        description="with these removed the label comes first; empty if it comes first already"
    )
    minimal: bool = Field(
        description="true if every member is needed: leaving out any one of them was tried and is not enough"
    )
    path: list[Step] = Field(description="one step per member that was tried, the strongest against the label first")
    rows: int = Field(description="number of rows of patches")
    columns: int


class InterveneResponse(AnswerShape):
    """A prediction and its account, before and after interventions."""

    mode: Mode
    before: Attribution = Field(description="what /v1/attribute would answer")
    results: list[Variant] = Field(
        description="one result for `edits`, or one for each of `variants`; for a counterfactual the one that was "
        "found, if any"
    )
    counterfactual: CounterfactualAnswer | None = None
    timings_ms: TimingsMs
