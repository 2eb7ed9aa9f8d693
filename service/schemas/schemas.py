"""The contract's shapes: what a request may ask and what an answer holds. Also the OpenAPI document's source."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from vitrine.service.errors import ServiceError

Shape = TypeVar("Shape", bound=BaseModel)
Label = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Template = Annotated[str, StringConstraints(pattern=r"\{\}")]


# The first wrong item is told, not each of millions.
Labels = Annotated[list[Label], Field(min_length=1, fail_fast=True)]
Templates = Annotated[list[Template], Field(min_length=1, fail_fast=True)]
DETAILS = 20  # mistakes named in one answer
MAX_FIELDS = 50  # far more than there are; beyond it unknown fields are not told one by one


class RequestShape(BaseModel):
    """What every request is: without fields that are none."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            raise ValueError(f"{len(fields):,} fields; there are only {', '.join(cls.model_fields)}")
        return fields


class Explain(RequestShape):
    """What to explain, and how far."""

    targets: Labels | None = Field(default=None, description="labels to explain; default: the top-1")
    contrast: Label | None = Field(default=None, description="explain each target's logit minus this label's")
    features: int = Field(
        default=5, ge=0, strict=True, description="features listed per layer, largest contribution first"
    )
    heatmap: bool = Field(default=False, description="split each target's attention rows by patch and by head")
    lens: bool = Field(default=False, description="the prediction as it stands after each layer")
    matrix: bool = Field(default=False, description="how much of each layer's output every source layer writes")


class ClassifyRequest(RequestShape):
    """Labels and templates; without either, the bundle's own."""

    labels: Labels | None = Field(default=None, examples=[["cat", "dog", "truck"]])
    label_set: str | None = Field(default=None, description="a named label set; `default` is the bundle's")
    templates: Templates | None = Field(default=None, examples=[["a photo of a {}"]])
    top_k: int = Field(default=5, ge=1, strict=True, description="predictions listed, largest logit first")

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str] | None) -> list[str] | None:
        if labels and len(set(labels)) < len(labels):
            raise ValueError("labels must differ from one another")
        return labels


class AttributeRequest(ClassifyRequest):
    explain: Explain = Field(default=Explain(), examples=[{"contrast": "dog", "features": 3, "heatmap": True}])


class EmbedRequest(RequestShape):
    """An image, texts, or both."""

    texts: Labels | None = Field(default=None, examples=[["a photo of a cat"]], description="embedded as they are")


Base64 = Annotated[str, Field(min_length=1, description="an image file, base64", json_schema_extra={"format": "byte"})]


class WithImage(BaseModel):
    image_base64: Base64


class ClassifyJson(ClassifyRequest, WithImage):
    pass


class AttributeJson(AttributeRequest, WithImage):
    pass


class BatchJson(AttributeRequest):
    images_base64: Annotated[list[Base64], Field(min_length=1, fail_fast=True)]


class EmbedJson(EmbedRequest):
    image_base64: Base64 | None = None


class Model(BaseModel):
    name: str
    digest: str = Field(description="sha256 of the bundle's manifest, and so of everything in it")


class Prediction(BaseModel):
    label: str
    probability: float
    logit: float


class LedgerAccount(BaseModel):
    """In logits. prior + sum(attention) + sum(clt) + bias + error + remainder = logit."""

    prior: float
    attention: list[float] = Field(description="one per layer")
    clt: list[float] = Field(description="one per source layer")
    bias: float
    error: float = Field(description="what the MLPs did and the CLT does not say")
    remainder: float = Field(description="rounding")


class Feature(BaseModel):
    index: int
    activation: float = Field(description="never 0; negative only where the bundle's sparsifier is abs_topk")
    contribution: float = Field(description="in logits; all active features of a layer sum to its clt row")
    label: str | None = None
    label_score: float | None = None


class LayerAccount(BaseModel):
    layer: int
    contribution: float = Field(description="the layer's clt row, in logits")
    share: float = Field(description="|contribution| as a part of the sum of all |rows|")
    projection: float = Field(description="C_{i->L-1} on [CLS] (arXiv 2604.13304); the layers sum to 1, or are all 0")
    drop_effect: float = Field(description="change of the target's probability when this row is taken out")
    features: list[Feature]


class HeatMap(BaseModel):
    """Where in the image the attention rows come from, in logits.

    sum(patches[l]) + class_token[l] + constant[l] = ledger.attention[l], up to rounding (the int8 graph's: a few
    thousandths); sum(heads[l]) is sum(patches[l]) again.
    """

    rows: int = Field(description="of patches")
    columns: int
    total: list[float] = Field(description="one per patch, row by row: the sum over layers of `patches`")
    patches: list[list[float]] = Field(description="one list per layer, one number per patch, over all heads")
    heads: list[list[float]] = Field(description="one list per layer, one number per head, over all patches")
    class_token: list[float] = Field(description="one per layer: what [CLS] took from itself")
    constant: list[float] = Field(description="one per layer: attention's biases")
    outliers: list[int] = Field(
        description="patches, by number, whose residual is over twice as long as the median: their place says little"
    )


class LensLayer(BaseModel):
    """The prediction if the network ended after this layer: its [CLS] residual through ln_post and the projection."""

    layer: int
    label: str
    probability: float
    entropy: float = Field(description="of the probabilities over all labels, in nats")


class Matrix(BaseModel):
    """C_{i->j} (arXiv 2604.13304): what part of a target layer's output j the features of a source layer i write.

    A list per target layer with a number per source layer: they sum to 1, or are all 0 where no feature is active.
    """

    cls: list[list[float]] = Field(description="at [CLS]")
    patches: list[list[float]] = Field(description="in the mean over patches")


class Explanation(BaseModel):
    target: str
    contrast: str | None
    logit: float = Field(description="the target's logit; with a contrast, minus the contrast's")
    ledger: LedgerAccount
    layers: list[LayerAccount]
    heatmap: HeatMap | None = None


class Fidelity(BaseModel):
    """How far the CLT's features stand for what the MLPs did, on this image."""

    r2: float = Field(description="of what the MLPs add to the embedding, about its mean over the training images")
    cosine: float
    error_share: float = Field(description="|error row| as a part of the sum of all |rows|, for the top-1 label")
    reconstructed_top1_agrees: bool = Field(description="the top-1 stays when the error row is taken out")


class AnswerShape(BaseModel):
    """What every answer has."""

    request_id: str
    model: Model


TimingsMs = Annotated[dict[str, float], Field(description="of each stage, in milliseconds")]


class ClassifyResponse(AnswerShape):
    predictions: list[Prediction]
    timings_ms: TimingsMs


class Attribution(BaseModel):
    """The prediction of one image, and the account of it."""

    predictions: list[Prediction]
    explanations: list[Explanation]
    lens: list[LensLayer] | None = None
    matrix: Matrix | None = None
    fidelity: Fidelity
    timings_ms: TimingsMs


class AttributeResponse(Attribution, AnswerShape):
    pass


class ItemError(BaseModel):
    code: str
    message: str
    details: list[dict[str, Any]]


class BatchItem(BaseModel):
    """One image's `answer`, or the `error` that it alone would have been answered with."""

    status: int = Field(description="what the image alone would have been answered with", examples=[200])
    answer: Attribution | None
    error: ItemError | None


class BatchResponse(AnswerShape):
    results: list[BatchItem] = Field(description="one per image, in the order of the request")


class EmbedResponse(AnswerShape):
    embedding: list[float] | None = Field(description="of the image, of length 1")
    text_embeddings: list[list[float]] | None = Field(description="one per text, of length 1")
    timings_ms: TimingsMs


class ModelResponse(BaseModel):
    """The bundle that is being served."""

    name: str
    digest: str
    provider: str
    precision: str
    manifest: dict[str, Any]


class LabelSetResponse(BaseModel):
    name: str
    labels: list[str]
    templates: list[str]


class LabelsResponse(BaseModel):
    """What `label_set` may name. `default` is what a request without labels gets."""

    model: Model
    label_sets: list[LabelSetResponse]


class ReloadResponse(BaseModel):
    """The bundle that is served from now on, and the one before it."""

    model: Model
    previous: Model


class ErrorBody(ItemError):
    request_id: str


class ErrorResponse(BaseModel):
    error: ErrorBody


def validated(shape: type[Shape], fields: Any) -> Shape:
    """`fields` as `shape`. Raises `ServiceError` naming the first mistakes."""
    try:
        return shape.model_validate(fields)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_context=False, include_input=False)[:DETAILS]
    details = [
        {"field": ".".join(map(str, e["loc"]))[:100], "problem": e["msg"].removeprefix("Value error, ")[:300]}
        for e in mistakes
    ]
    field, problem = details[0]["field"], details[0]["problem"]
    if field in ("image_base64", "images_base64") and problem == "Field required":
        raise ServiceError("missing_image", f"`{field}` is missing", details)
    raise ServiceError("invalid_request", f"{field or 'the request'}: {problem}", details)
