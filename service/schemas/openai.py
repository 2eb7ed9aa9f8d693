"""Requests and answers in the shape of OpenAI's API: embeddings, and the list of models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from vitrine.service.schemas.base import Label, Labels, RequestShape, Strict, Warnings
from vitrine.service.schemas.edits import EDIT, EditUsed

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfz0AEYBxVSF+FAAhKDveksOjm"
    "AAAAAElFTkSuQmCC"
)


def _no_tokens(value: Any) -> Any:
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, int | list):
        raise ValueError("numbers of tokens are another model's: send texts")
    return value


class EmbeddingsRequest(RequestShape):
    """Texts and images, one or many."""

    model: str = Field(description="the bundle's name, as `GET /v1/models` has it", examples=["demo"])
    input: Annotated[Label | Labels, BeforeValidator(_no_tokens)] = Field(
        description="texts, and images as data URLs (`data:image/png;base64,…`), in any order. No URL is fetched",
        examples=["a photo of a cat", ["a photo of a cat", PIXEL]],
    )
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="of the vectors: numbers, or float32 in little-endian order, in base64"
    )
    dimensions: int | None = Field(
        default=None, strict=True, description="as many as the CLIP's embeddings have: CLIP's cannot be shortened"
    )
    user: str | None = Field(default=None, description="is not used")
    strict: Strict = False
    edit: str | None = Field(default=None, description=f"of images' embeddings: {EDIT}")


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int = Field(description="of `input`")
    embedding: list[float] | str = Field(description="of length 1; products are cosines")


class Usage(BaseModel):
    prompt_tokens: int = Field(description="of all texts as the CLIP reads them, with start and end; images have none")
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """As OpenAI's, and what every answer of this service has."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    edit: EditUsed | None = Field(default=None, description="of the images; null: CLIP as it is")
    warnings: Warnings = []


class ServedModel(BaseModel):
    """As OpenAI has it (`id` …), and KServe's V1 protocol (`name`, `ready`)."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when it came into service, in seconds since 1970")
    owned_by: Literal["vitrine"] = "vitrine"
    name: str
    ready: bool


class ServedModels(BaseModel):
    """As OpenAI has it (`data`), and KServe's V1 protocol (`models`)."""

    object: Literal["list"] = "list"
    data: list[ServedModel]
    models: list[str]


class OpenAIErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = Field(description="the field that is wrong")
    code: str = Field(description="as everywhere in this service")


class OpenAIError(BaseModel):
    error: OpenAIErrorBody
