"""Features of residual SAEs in an answer."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ResidualFeature(BaseModel):
    index: int
    activation: float = Field(
        description="in standard deviations of its token; for several tokens, the one with the largest magnitude"
    )
    label: str | None = None
    label_score: float | None = None


class ResidualPatchFeature(ResidualFeature):
    tokens: list[float] = Field(description="its activation at each patch, row by row")


class ResidualLayer(BaseModel):
    """What the SAE after one block reads in the residual stream."""

    layer: int = Field(description="the block that the SAE follows")
    active_cls: int = Field(description="number of features active at [CLS]")
    active_patches: int = Field(description="number of features active at any patch")
    cls: list[ResidualFeature] = Field(description="features at [CLS], largest activation first")
    patches: list[ResidualPatchFeature] = Field(description="features at patches, largest activation first")


class ResidualFeatures(BaseModel):
    """Features of the residual SAEs (arXiv 2509.17401), one after every block except the last. They show what
    the stream consists of there, whatever the label. `POST /v1/circuit` with `dictionary: residual` shows which of them
    made a logit.
    """

    layers: list[ResidualLayer]
    rows: int = Field(description="number of rows of patches")
    columns: int
