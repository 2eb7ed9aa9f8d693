"""Attribution of many images in one request."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from vitrine.service.schemas.attribute import AttributeRequest, Attribution
from vitrine.service.schemas.base import AnswerShape, Base64, ItemError


class BatchJson(AttributeRequest):
    images_base64: Annotated[list[Base64], Field(min_length=1, fail_fast=True)]


class BatchItem(BaseModel):
    """The `answer` for one image, or the `error` that a request with only this image would have got."""

    status: int = Field(
        description="the HTTP status that a request with only this image would have got", examples=[200]
    )
    answer: Attribution | None
    error: ItemError | None


class BatchResponse(AnswerShape):
    """`warnings` here are about the labels, which all images share; warnings about one image are in its answer."""

    results: list[BatchItem] = Field(description="one result per image, in the order of the request")
