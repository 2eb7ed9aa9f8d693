"""Attribution of many images in one request."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from vitrine.service.schemas.attribute import AttributeRequest, Attribution
from vitrine.service.schemas.base import AnswerShape, Base64, ItemError


class BatchJson(AttributeRequest):
    images_base64: Annotated[list[Base64], Field(min_length=1, fail_fast=True)]


class BatchItem(BaseModel):
    """One image's `answer`, or the `error` that it alone would have been answered with."""

    status: int = Field(description="what the image alone would have been answered with", examples=[200])
    answer: Attribution | None
    error: ItemError | None


class BatchResponse(AnswerShape):
    """`warnings` here are of the labels, which all images share; an image's own are in its answer."""

    results: list[BatchItem] = Field(description="one per image, in the order of the request")
