"""Embeddings of an image and of texts."""

from __future__ import annotations

from pydantic import Field

from vitrine.service.schemas.base import AnswerShape, Base64, Labels, RequestShape, Strict, TimingsMs
from vitrine.service.schemas.edits import EDIT


class EmbedRequest(RequestShape):
    """An image, texts, or both."""

    texts: Labels | None = Field(
        default=None, examples=[["a photo of a cat"]], description="texts to embed, without templates"
    )
    strict: Strict = False
    edit: str | None = Field(default=None, description=f"for the image's embedding: {EDIT}")


class EmbedJson(EmbedRequest):
    image_base64: Base64 | None = None


class EmbedResponse(AnswerShape):
    embedding: list[float] | None = Field(description="embedding of the image, normalised to length 1")
    text_embeddings: list[list[float]] | None = Field(description="one embedding per text, normalised to length 1")
    timings_ms: TimingsMs
