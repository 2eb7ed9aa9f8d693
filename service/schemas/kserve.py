"""Requests and answers of KServe's V1 protocol (TensorFlow Serving's)."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from vitrine.service.schemas.attribute import AttributeRequest, Attribution
from vitrine.service.schemas.base import RequestShape, Warnings
from vitrine.service.schemas.classify import ClassifyRequest, Prediction, Verdict
from vitrine.service.schemas.edits import EditUsed


class Base64Bytes(RequestShape):
    """Bytes, as TensorFlow Serving writes them in JSON."""

    b64: str


class ImageInstance(RequestShape):
    """An image under one of the names that KServe's examples use, and the client's own `key`."""

    b64: str | None = None
    image: str | Base64Bytes | None = None
    image_bytes: str | Base64Bytes | None = None
    data: str | Base64Bytes | None = None
    key: str | int | None = Field(default=None, description="returned with the prediction")


Instances = Annotated[
    list[str | ImageInstance],
    Field(
        min_length=1,
        fail_fast=True,
        description="images, in base64 or as data URLs. Other URLs are not fetched",
        examples=[[{"image": {"b64": "iVBORw0KGgo…"}}]],
    ),
]


class PredictRequest(RequestShape):
    instances: Instances
    parameters: ClassifyRequest = Field(
        default=ClassifyRequest(), description="the options of `/v1/classify`, for all images"
    )


class ExplainRequest(RequestShape):
    instances: Instances
    parameters: AttributeRequest = Field(
        default=AttributeRequest(), description="the options of `/v1/attribute`, for all images"
    )


class InstancePrediction(BaseModel):
    key: str | int | None = Field(description="key of the instance")
    predictions: list[Prediction]
    verdict: Verdict | None
    edit: EditUsed | None
    warnings: Warnings


class PredictResponse(BaseModel):
    predictions: list[InstancePrediction] = Field(description="one per instance, in the same order")


class ExplainResponse(BaseModel):
    explanations: list[Attribution] = Field(description="one per instance, in the same order")


class PlainError(BaseModel):
    """An error of KServe's protocols."""

    model_config = ConfigDict(extra="forbid")

    error: str
