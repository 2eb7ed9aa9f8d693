"""Why an attention head looks where it does: the question, and the answer."""

from __future__ import annotations

from pydantic import BaseModel, Field

from vitrine.service.schemas.base import RequestShape
from vitrine.service.schemas.sources import SourceAccount


class HeadQuestion(RequestShape):
    """One head, and which of its scores to explain. Tokens are numbered: 0 is [CLS], then patches row by row from 1."""

    layer: int = Field(ge=0, strict=True, description="the layer of the attention head")
    head: int = Field(ge=0, strict=True)
    query: int = Field(default=0, ge=0, strict=True, description="the token that attends; 0: [CLS]")
    key: int | None = Field(
        default=None,
        ge=0,
        strict=True,
        description="the token that is attended to; default: the one with the largest attention weight",
    )
    relative: bool = Field(
        default=True,
        strict=True,
        description="true: explain the score minus its mean over all keys, because only this difference changes the "
        "softmax; false: explain the score itself, including what it shares with all other keys",
    )
    features: int = Field(
        default=12,
        ge=0,
        le=100,
        strict=True,
        description="number of features to list for the query and for the key, largest first",
    )
    pairs: int = Field(
        default=12,
        ge=0,
        le=1_000,
        strict=True,
        description="number of pairs to list, largest first; a pair is a listed feature of the query with any feature "
        "of the key. 0 takes a fraction of the time",
    )


class PairFeature(BaseModel):
    layer: int
    index: int
    label: str | None = None


class ScorePair(BaseModel):
    query: PairFeature
    key: PairFeature
    contribution: float = Field(description="contribution to the score, summed over all tokens at which the two fire")


class AttentionAccount(BaseModel):
    """Why a head attends from one token to another: its score, split over what was written before its layer.

    In the score's units, before the softmax. Each of `of_query` and `of_key` sums to `explained`, and so do `pairs` and
    `other_pairs`.
    """

    layer: int
    head: int
    query: int = Field(description="number of the token: 0 is [CLS], then the patches row by row")
    key: int = Field(
        description="number of the token; if the request has none, the one with the largest attention weight"
    )
    weight: float = Field(description="the attention weight")
    score: float = Field(description="<query, key> / sqrt(width of a head)")
    mean_score: float = Field(description="mean score of this query over all keys")
    relative: bool = Field(description="whether the accounts explain score - mean_score (true) or score (false)")
    explained: float = Field(description="what the accounts explain: score - mean_score, or score")
    of_query: SourceAccount = Field(description="account of what made the query, with the key held constant")
    of_key: SourceAccount = Field(
        description="account of what made the key (with relative: minus the mean of all keys), with the query held "
        "constant"
    )
    pairs: list[ScorePair] = Field(
        description="pairs with the largest |contribution| first; their features are in both accounts"
    )
    other_pairs: float = Field(
        description="everything outside the listed pairs: other features, embeddings, errors, biases and constants"
    )
    weights: list[float] = Field(description="the query's attention weight for every token")
    rows: int = Field(description="number of rows of patches")
    columns: int
