"""Features: cards, searches, similar images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from vitrine.models.bundle.layout import Dictionary
from vitrine.service.schemas.base import AnswerShape, Model, RequestShape, TimingsMs, Warnings, WithImage


class SimilarRequest(RequestShape):
    """Which of the nearest reference images to list."""

    layers: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)] | None = Field(
        default=None, description="layers whose codes are compared; default: all"
    )
    limit: int = Field(default=5, ge=1, le=50, strict=True, description="number of images per layer")
    offset: int = Field(default=0, ge=0, le=10**9, strict=True, description="number of nearer images to skip")


class CardQuery(RequestShape):
    """The dictionary of a feature."""

    dictionary: Dictionary = Field(
        default="clt", description="clt: a feature of the CLT; residual: a feature of the residual SAEs"
    )


class FeaturesQuery(CardQuery):
    """A search among labelled features, one page at a time."""

    label: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="text that the label contains; upper and lower case are treated alike",
    )
    layer: int | None = Field(default=None, ge=0, le=10_000, description="only features of this layer")
    offset: int = Field(default=0, ge=0, le=10**9, description="number of better features to skip")
    limit: int = Field(default=20, ge=1, le=100, description="number of features per page")


class SimilarJson(SimilarRequest, WithImage):
    pass


class ReferenceImage(BaseModel):
    """An image of the data that the cards were made from."""

    name: str
    class_name: str
    thumbnail: str | None = Field(description="data: URL of a small version of the image, if the bundle has them")


class Exemplar(ReferenceImage):
    """One of the images on which the feature fires most."""

    activation: float
    mask: list[float] = Field(
        description="the feature's |activation| on every patch, row by row; all 0 if it fires only at [CLS]"
    )


class Histogram(BaseModel):
    edges: list[float] = Field(description="edges of the bins, one more than there are bins")
    counts: list[int] = Field(description="number of images in each bin")


class Frequency(BaseModel):
    cls: float = Field(description="share of images on which it fires at [CLS]")
    patches: float = Field(description="share of patches on which it fires")


class Written(BaseModel):
    """The label that a feature's direction adds most to, independent of what the feature fires on."""

    label: str
    score: float = Field(description="cosine of the folded direction and the label, centred over the vocabulary")
    margin: float = Field(description="`score` minus the runner-up's")


class CoactiveFeature(BaseModel):
    layer: int
    index: int
    label: str | None
    jaccard: float = Field(description="images on which both features fire, divided by images on which either fires")


class CardResponse(BaseModel):
    """What is known about one feature."""

    model: Model
    dictionary: Dictionary
    layer: int
    index: int
    label: str | None = Field(description="what it fires on; null if no label was good enough")
    abstained: str | None = Field(
        description="why there is no label: too_few_exemplars, or the score that is too low (in cards of an older "
        "version also clarity or margin)"
    )
    label_score: float | None = Field(
        description="how well the label distinguishes images on which the feature fires from others, on the images "
        "that the label was chosen with: AUROC, 0.5 is chance (in cards of an older version the mean cosine of an "
        "exemplar and the label)"
    )
    label_margin: float | None = Field(description="`label_score` minus the runner-up's")
    label_clarity: float | None = Field(
        description="how similar the exemplars are to each other: the mean cosine of two of them"
    )
    label_auroc: float | None = Field(
        description="the AUROC on held-out images; null if it fires on too few or too many of them"
    )
    writes: Written | None
    read_at: Literal["cls", "patches"] = Field(
        description="where its activation is read: at [CLS], or, if it rarely fires there, as the largest over patches"
    )
    frequency: Frequency
    quantiles: dict[str, float] = Field(
        description="quantiles of its activation where it fires; empty if it never fires"
    )
    histogram: Histogram | None = Field(description="histogram of |activation|; null if it never fires")
    exemplars: list[Exemplar] = Field(description="largest |activation| first")
    mean_picture: str | None = Field(description="data: URL of the mean of the exemplars, if the bundle has one")
    rows: int = Field(description="number of rows of patches in masks")
    columns: int
    coactive: list[CoactiveFeature]
    warnings: Warnings = []


class FeatureLine(BaseModel):
    layer: int
    index: int
    label: str
    label_score: float
    label_auroc: float | None
    frequency_cls: float


class FeaturesResponse(BaseModel):
    """Labelled features, best label first."""

    model: Model
    dictionary: Dictionary
    total: int = Field(description="number of features found, on all pages")
    offset: int
    limit: int
    next: str | None = Field(description="path of the next page")
    features: list[FeatureLine]
    warnings: Warnings = []


class SimilarImage(ReferenceImage):
    similarity: float = Field(description="cosine of the two codes at [CLS]")


class SimilarLayer(BaseModel):
    layer: int
    images: list[SimilarImage]


class SimilarResponse(AnswerShape):
    """The reference images whose sparse codes are nearest, layer by layer, nearest first."""

    references: int = Field(description="number of reference images that were compared")
    layers: list[SimilarLayer]
    timings_ms: TimingsMs
