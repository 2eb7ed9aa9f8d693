"""Requests and answers of the Open Inference Protocol (KServe's V2, Triton's)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, RootModel

from vitrine.service.schemas.base import RequestShape, Warnings
from vitrine.service.schemas.classify import Verdict
from vitrine.service.schemas.edits import EditUsed

Datatype = Literal["BYTES", "FP32"]


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool


class TensorMetadata(BaseModel):
    name: str
    datatype: Datatype
    shape: list[int] = Field(description="-1: any size")


class ModelMetadata(BaseModel):
    name: str
    versions: list[str] = Field(description="one version: the start of the bundle's digest")
    platform: str
    inputs: list[TensorMetadata] = Field(description="`labels` and `templates` are optional")
    outputs: list[TensorMetadata]


class InputTensor(RequestShape):
    name: Literal["image", "labels", "templates"] = Field(
        description="`image`: image files; in JSON, in base64 or as data URLs. Other URLs are not fetched"
    )
    datatype: Literal["BYTES"]
    shape: list[int] = Field(min_length=1, max_length=2, description="[N] or [N, 1]", examples=[[1]])
    data: list[Any] | None = Field(default=None, description="texts; absent if they follow as bytes")
    parameters: dict[str, Any] = Field(default={}, description="`binary_data_size`: number of bytes that follow")


class OutputAsked(RequestShape):
    name: Literal["label", "probability", "logit", "cosine", "embedding"]
    parameters: dict[str, Any] = Field(
        default={}, description="`binary_data`: return the tensor as bytes after the JSON"
    )


class InferRequest(RequestShape):
    id: str | None = Field(default=None, description="returned with the answer")
    parameters: dict[str, Any] = Field(
        default={},
        description="options of `/v1/classify` (`top_k`, `label_set`, `strict`, `edit`, `scoring`, `threshold`), and "
        "`binary_data_output`",
        examples=[{"top_k": 2}],
    )
    inputs: list[InputTensor] = Field(min_length=1, max_length=3)
    outputs: list[OutputAsked] | None = Field(
        default=None, min_length=1, max_length=5, description="default: label, probability, logit, cosine"
    )


class OutputTensor(BaseModel):
    name: str
    datatype: Datatype
    shape: list[int] = Field(description="[images, predictions], or [images, D] for embeddings")
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = Field(default=None, description="row by row; absent if the data follows as bytes")


class Note(BaseModel):
    """What the answer says about one image in addition to its tensors."""

    edit: EditUsed | None
    verdict: Verdict | None
    warnings: Warnings


class Notes(RootModel[list[Note]]):
    """One per image, in the same order."""


class ResponseParameters(BaseModel):
    notes: str = Field(
        description="JSON in a text, because parameters are texts: `edit`, `verdict` and `warnings` of each image"
    )


class InferResponse(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    parameters: ResponseParameters
    outputs: list[OutputTensor]
