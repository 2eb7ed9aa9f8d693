"""Features of residual SAEs in an answer."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ResidualFeature(BaseModel):
    index: int
    activation: float = Field(description="in standard deviations of its token; of several tokens the largest by size")
    label: str | None = None
    label_score: float | None = None


class ResidualPatchFeature(ResidualFeature):
    tokens: list[float] = Field(description="its activation at each patch, row by row")


class ResidualLayer(BaseModel):
    """What the SAE after one block reads in the stream."""

    layer: int = Field(description="the block before it")
    active_cls: int = Field(description="features active at [CLS]")
    active_patches: int = Field(description="features active at any patch")
    cls: list[ResidualFeature] = Field(description="at [CLS], the largest activation first")
    patches: list[ResidualPatchFeature] = Field(description="at patches, likewise")


class ResidualFeatures(BaseModel):
    """Features of the residual SAEs (arXiv 2509.17401), one after every block but the last. They say of what the stream
    consists there, whatever the label; which of them made a logit, `POST /v1/circuit` says with `dictionary: residual`.
    """

    layers: list[ResidualLayer]
    rows: int = Field(description="of patches")
    columns: int
