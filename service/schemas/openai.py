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
        raise ValueError("token numbers belong to another model's tokenizer: send texts")
    return value


class EmbeddingsRequest(RequestShape):
    """One or more texts and images."""

    model: str = Field(description="the bundle's name, as in `GET /v1/models`", examples=["demo"])
    input: Annotated[Label | Labels, BeforeValidator(_no_tokens)] = Field(
        description="texts, and images as data URLs (`data:image/png;base64,…`), in any order. Other URLs are not "
        "fetched",
        examples=["a photo of a cat", ["a photo of a cat", PIXEL]],
    )
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="format of the vectors. float: numbers; base64: little-endian float32 in base64"
    )
    dimensions: int | None = Field(
        default=None,
        strict=True,
        description="must equal the width of the CLIP's embeddings, which cannot be shortened",
    )
    user: str | None = Field(default=None, description="not used")
    strict: Strict = False
    edit: str | None = Field(default=None, description=f"for the embeddings of images: {EDIT}")


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int = Field(description="position in `input`")
    embedding: list[float] | str = Field(description="normalised to length 1, so that products are cosines")


class Usage(BaseModel):
    prompt_tokens: int = Field(
        description="number of tokens of all texts as the CLIP reads them, with start and end tokens; images count as 0"
    )
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """OpenAI's fields, and those that every answer of this service has."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    edit: EditUsed | None = Field(default=None, description="the edit used for the images; null: the unmodified CLIP")
    warnings: Warnings = []


class ServedModel(BaseModel):
    """The fields of OpenAI's API (`id` …) and of KServe's V1 protocol (`name`, `ready`)."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when the bundle came into service, in seconds since 1970")
    owned_by: Literal["vitrine"] = "vitrine"
    name: str
    ready: bool


class ServedModels(BaseModel):
    """The field of OpenAI's API (`data`) and that of KServe's V1 protocol (`models`)."""

    object: Literal["list"] = "list"
    data: list[ServedModel]
    models: list[str]


class OpenAIErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = Field(description="the field with the problem")
    code: str = Field(description="an error code of this service, as in its other answers")


class OpenAIError(BaseModel):
    error: OpenAIErrorBody
