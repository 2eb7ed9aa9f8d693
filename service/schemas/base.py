"""What all requests and answers share, and the validation errors of requests."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

from vitrine.service.errors import ServiceError
from vitrine.service.schemas.edits import EditUsed

Shape = TypeVar("Shape", bound=BaseModel)
Label = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Template = Annotated[str, StringConstraints(pattern=r"\{\}")]


# Only the first wrong item is reported, not each of millions.
Labels = Annotated[list[Label], Field(min_length=1, fail_fast=True)]
Templates = Annotated[list[Template], Field(min_length=1, fail_fast=True)]
DETAILS = 20  # errors listed in one answer
MAX_FIELDS = 50  # far more than any request has; beyond it unknown fields are not listed one by one


class RequestShape(BaseModel):
    """What every request has in common: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _limit_fields(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            raise ValueError(f"the request has {len(fields):,} fields; the only ones are {', '.join(cls.model_fields)}")
        return fields


Base64 = Annotated[
    str, Field(min_length=1, description="an image file in base64", json_schema_extra={"format": "byte"})
]


class WithImage(BaseModel):
    image_base64: Base64


class Model(BaseModel):
    name: str
    digest: str = Field(description="sha256 of the bundle's manifest, and so of every file in the bundle")


class Notice(BaseModel):
    """A warning about what was sent, for the reader of the answer."""

    code: str = Field(description="labels_… or image_…; service/README.md lists all codes", examples=["labels_same"])
    message: str = Field(
        examples=['"Cat" and "cat" are the same text to this CLIP, so their order means nothing. Keep one of them.']
    )
    labels: list[str] | None = Field(
        default=None, description="the labels that the warning is about, if it is about labels"
    )


Warnings = Annotated[list[Notice], Field(description="warnings about what was sent; empty if there are none")]


class AnswerShape(BaseModel):
    """What every answer to a question has."""

    request_id: str
    model: Model
    edit: EditUsed | None = Field(
        default=None, description="the edit that was used; null: the answer is the unmodified CLIP's"
    )
    warnings: Warnings = []


Strict = Annotated[
    bool,
    Field(
        strict=True,
        description="refuse labels that this CLIP cuts, does not know, or cannot distinguish from another label",
    ),
]
TimingsMs = Annotated[dict[str, float], Field(description="time of each stage, in milliseconds")]


class ItemError(BaseModel):
    code: str
    message: str
    details: list[dict[str, Any]]


class ErrorBody(ItemError):
    request_id: str


class ErrorResponse(BaseModel):
    error: ErrorBody


def _problem(shape: type[BaseModel], error: ErrorDetails) -> str:
    """What is wrong with a field; of one that does not exist, the name that may be meant."""
    if error["type"] != "extra_forbidden":
        return error["msg"].removeprefix("Value error, ")
    *parents, name = error["loc"]
    for parent in parents:
        if not isinstance(parent, int) and parent in shape.model_fields:
            shape = next(_shapes(shape.model_fields[parent].annotation), shape)
    near = difflib.get_close_matches(str(name)[:100], shape.model_fields, 1)
    return (
        f"no such field; did you mean {near[0]}?"
        if near
        else f"no such field; the fields are {', '.join(shape.model_fields)}"
    )


def _shapes(annotation: Any) -> Iterator[type[BaseModel]]:
    """The shapes in an annotation: of `list[Edit] | None`, Edit."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _shapes(part)


def validated(shape: type[Shape], fields: Any) -> Shape:
    """`fields` validated as `shape`. Raises `ServiceError` naming the first errors."""
    try:
        return shape.model_validate(fields)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)[:DETAILS]
    details = [{"field": ".".join(map(str, e["loc"]))[:100], "problem": _problem(shape, e)[:300]} for e in errors]
    field, problem = details[0]["field"], details[0]["problem"]
    if field in ("image_base64", "images_base64") and problem == "Field required":
        raise ServiceError("missing_image", f"`{field}` is missing", details)
    raise ServiceError("invalid_request", f"{field or 'the request'}: {problem}", details)
