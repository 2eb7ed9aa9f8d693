"""Why an attention head looks where it does: the question, and the answer."""

from __future__ import annotations

from pydantic import BaseModel, Field

from vitrine.service.schemas.base import RequestShape
from vitrine.service.schemas.sources import SourceAccount


class HeadQuestion(RequestShape):
    """One head, and which of its scores to explain. Tokens: 0 is [CLS], then the patches row by row, from 1."""

    layer: int = Field(ge=0, strict=True, description="whose attention it is")
    head: int = Field(ge=0, strict=True)
    query: int = Field(default=0, ge=0, strict=True, description="the token that looks; 0: [CLS]")
    key: int | None = Field(
        default=None, ge=0, strict=True, description="the token looked at; default: the one that has most attention"
    )
    relative: bool = Field(
        default=True,
        strict=True,
        description="explain the score less its mean over all keys, which is all that the softmax sees; "
        "false: the score itself, with what it has in common with those of all other keys",
    )
    features: int = Field(
        default=12, ge=0, le=100, strict=True, description="features listed of the query and of the key, largest first"
    )
    pairs: int = Field(
        default=12,
        ge=0,
        le=1_000,
        strict=True,
        description="pairs listed, largest first, of the query's listed features with any of the key's; "
        "0 takes a fraction of the time",
    )


class PairFeature(BaseModel):
    layer: int
    index: int
    label: str | None = None


class ScorePair(BaseModel):
    query: PairFeature
    key: PairFeature
    contribution: float = Field(description="to the score, over all tokens at which the two fire")


class AttentionAccount(BaseModel):
    """Why a head looks from one token at another: its score, split over what was written before its layer.

    In the score's units, before the softmax. Each of `of_query` and `of_key` sums to `explained`, and so do `pairs` and
    `other_pairs`.
    """

    layer: int
    head: int
    query: int = Field(description="token: 0 is [CLS], then the patches row by row")
    key: int = Field(description="token; if none was asked for, the one that has most attention")
    weight: float = Field(description="the attention weight")
    score: float = Field(description="<query, key> / sqrt(width of a head)")
    mean_score: float = Field(description="of this query, over all keys")
    relative: bool = Field(description="whether the accounts are of score - mean_score, or of score")
    explained: float = Field(description="score - mean_score, or score: what the accounts are of")
    of_query: SourceAccount = Field(description="by what made the query; the key is held")
    of_key: SourceAccount = Field(description="by what made the key (relative: and not all others); the query is held")
    pairs: list[ScorePair] = Field(description="those with the largest |contribution| first; they are in both accounts")
    other_pairs: float = Field(
        description="all that is in no listed pair: of other features, embeddings, errors, biases and constants"
    )
    weights: list[float] = Field(description="the query's attention to every token")
    rows: int = Field(description="of patches")
    columns: int
