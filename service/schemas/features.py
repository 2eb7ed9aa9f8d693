"""Features: cards, searches, similar images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from vitrine.models.bundle.layout import Dictionary
from vitrine.service.schemas.base import AnswerShape, Model, RequestShape, TimingsMs, Warnings, WithImage


class SimilarRequest(RequestShape):
    """Which of the nearest reference images."""

    layers: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)] | None = Field(
        default=None, description="layers whose code is compared; default: all"
    )
    limit: int = Field(default=5, ge=1, le=50, strict=True, description="images a layer")
    offset: int = Field(default=0, ge=0, le=10**9, strict=True, description="nearer images that are left out")


class CardQuery(RequestShape):
    """Whose feature."""

    dictionary: Dictionary = Field(default="clt", description="of the CLT, or of the residual SAEs")


class FeaturesQuery(CardQuery):
    """A search among labelled features, a page at a time."""

    label: str | None = Field(
        default=None, min_length=1, max_length=256, description="part of the label, in letters of either case"
    )
    layer: int | None = Field(default=None, ge=0, le=10_000, description="features of this layer alone")
    offset: int = Field(default=0, ge=0, le=10**9, description="better features that are left out")
    limit: int = Field(default=20, ge=1, le=100, description="features on a page")


class SimilarJson(SimilarRequest, WithImage):
    pass


class ReferenceImage(BaseModel):
    """An image of the data that the cards were made of."""

    name: str
    class_name: str
    thumbnail: str | None = Field(description="data: URL of a small picture, if the bundle has them")


class Exemplar(ReferenceImage):
    """An image on which the feature fires most."""

    activation: float
    mask: list[float] = Field(
        description="the feature's |activation| on every patch, row by row; all 0 where it fires at [CLS] alone"
    )


class Histogram(BaseModel):
    edges: list[float] = Field(description="of the bins, one more than there are")
    counts: list[int] = Field(description="images")


class Frequency(BaseModel):
    cls: float = Field(description="share of images on which it fires at [CLS]")
    patches: float = Field(description="share of patches on which it fires")


class Written(BaseModel):
    """The label that a feature's direction adds most to, whatever the feature fires on."""

    label: str
    score: float = Field(description="cosine of the folded direction and the label, centred over the vocabulary")
    margin: float = Field(description="to the runner-up")


class CoactiveFeature(BaseModel):
    layer: int
    index: int
    label: str | None
    jaccard: float = Field(description="images on which both fire, as a part of those on which one does")


class CardResponse(BaseModel):
    """What is known of one feature."""

    model: Model
    dictionary: Dictionary
    layer: int
    index: int
    label: str | None = Field(description="what it fires on; null where that could not be said")
    abstained: str | None = Field(
        description="why there is no label: too_few_exemplars, or a score that is too low (or, in bundles whose cards "
        "are of an older version, a clarity or margin)"
    )
    label_score: float | None = Field(
        description="how well the label tells images on which it fires from others, among those that it was chosen by: "
        "AUROC, 0.5 is chance (in cards of an older version the mean cosine of an exemplar and the label)"
    )
    label_margin: float | None = Field(description="that score minus the runner-up's")
    label_clarity: float | None = Field(description="how far exemplars agree: the mean cosine of two of them")
    label_auroc: float | None = Field(
        description="the same on held-out images; null: it fires on too few or on too many of them"
    )
    writes: Written | None
    read_at: Literal["cls", "patches"] = Field(
        description="where its activation is read: at [CLS], or, if it hardly fires there, the largest over patches"
    )
    frequency: Frequency
    quantiles: dict[str, float] = Field(description="of its activation where it fires; empty if it never does")
    histogram: Histogram | None = Field(description="of |activation|; null if it never fires")
    exemplars: list[Exemplar] = Field(description="largest |activation| first")
    mean_picture: str | None = Field(description="data: URL of the exemplars' mean, if the bundle has one")
    rows: int = Field(description="of patches, in masks")
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
    total: int = Field(description="that were found, on all pages")
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

    references: int = Field(description="images that were compared with")
    layers: list[SimilarLayer]
    timings_ms: TimingsMs
