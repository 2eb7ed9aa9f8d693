"""A source account in an answer."""

from __future__ import annotations

from pydantic import BaseModel, Field


class SourceFeature(BaseModel):
    """One feature of a layer, summed over all tokens at which it fires."""

    layer: int
    index: int
    contribution: float = Field(description="the sum of `tokens`")
    activation: float = Field(description="the activation with the largest magnitude over all tokens")
    tokens: list[float] = Field(description="its contribution from each token: [CLS], then the patches row by row")
    label: str | None = None
    label_score: float | None = None


class SourceLayer(BaseModel):
    layer: int
    features: float = Field(description="contribution of all features of this layer, listed or not")
    error: float = Field(description="what this layer's MLP wrote at all tokens and the CLT does not explain")
    bias: float = Field(description="contribution of the bias of the decoder for this layer's MLP output")
    baseline: float | None = Field(
        default=None, description="with `baseline: mean`: what this layer's features contribute in the average image"
    )
    silent: float | None = Field(
        default=None,
        description="with `baseline: mean`: minus the contribution in the average image of those features that do not "
        "fire in this image",
    )


class SourceAccount(BaseModel):
    """The logit, or in `attention` the score, followed back through attention to what was written, in its units.

    sum(layers: features + error + bias + baseline + silent) + sum(embedding) + constants + remainder = logit. It is
    computed with the float32 graph, whatever the precision of the prediction.
    """

    logit: float = Field(description="the logit; in `attention` the value of `explained`")
    features: list[SourceFeature] = Field(
        description="the features with the largest |contribution| of all layers, largest first"
    )
    layers: list[SourceLayer]
    embedding: list[float] = Field(
        description="contribution of the class token, then of each patch, as they enter the first block"
    )
    constants: float = Field(description="what attention, and ln_post or the query or key, add for every image")
    map: list[float] = Field(
        description="everything that was written at each token: [CLS], then the patches row by row"
    )
    rows: int = Field(description="number of rows of patches")
    columns: int
    error_share: float = Field(description="sum of the |error| of all layers divided by the sum of all |rows|")
    remainder: float = Field(description="rounding error")
