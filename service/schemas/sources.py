"""A source account in an answer."""

from __future__ import annotations

from pydantic import BaseModel, Field


class SourceFeature(BaseModel):
    """A feature of a layer, over all tokens at which it fires."""

    layer: int
    index: int
    contribution: float = Field(description="over all tokens: the sum of `tokens`")
    activation: float = Field(description="the largest by magnitude, of all tokens")
    tokens: list[float] = Field(description="its contribution from each token: [CLS], then the patches row by row")
    label: str | None = None
    label_score: float | None = None


class SourceLayer(BaseModel):
    layer: int
    features: float = Field(description="of all features of this layer, listed or not")
    error: float = Field(description="what this layer's MLP wrote at all tokens and the CLT does not say")
    bias: float = Field(description="of the decoder of this layer's MLP output")
    baseline: float | None = Field(
        default=None, description="with `baseline: mean`: what this layer's features contribute in the average picture"
    )
    silent: float | None = Field(
        default=None, description="with `baseline: mean`: minus what those contribute there that do not fire here"
    )


class SourceAccount(BaseModel):
    """The logit, or in `attention` the score, followed back through attention to what was written, in its units.

    sum(layers: features + error + bias + baseline + silent) + sum(embedding) + constants + remainder = logit. It is the
    float32 graph's, whatever precision the prediction was made in.
    """

    logit: float = Field(description="in `attention`: `explained`")
    features: list[SourceFeature] = Field(description="those with the largest |contribution| of all layers, first")
    layers: list[SourceLayer]
    embedding: list[float] = Field(description="of the class token, then of each patch, as they enter the first block")
    constants: float = Field(description="what attention, and ln_post or the query or key, add whatever the picture")
    map: list[float] = Field(description="all that was written at each token: [CLS], then the patches row by row")
    rows: int = Field(description="of patches")
    columns: int
    error_share: float = Field(description="the errors' part of the sum of all |rows|, layer by layer")
    remainder: float = Field(description="rounding")
