"""Options of the Python calls: the fields of the service's requests, without the nesting."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypedDict, TypeVar

from pydantic import BaseModel

from vitrine.models.bundle.layout import Dictionary
from vitrine.models.interventions.short_form import parse
from vitrine.models.interventions.spec import Mode
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.base import RequestShape, validated

Shape = TypeVar("Shape", bound=RequestShape)


class LabelOptions(TypedDict, total=False):
    """The labels that an image is compared with. service/README.md explains each field."""

    labels: Sequence[str] | None  # default: the bundle's own
    label_set: str | None  # a named one, in place of labels
    templates: Sequence[str] | None
    strict: bool
    top_k: int  # predictions listed


class ClassifyOptions(LabelOptions, total=False):
    edit: str | None
    scoring: Literal["softmax", "independent"]
    threshold: float | Mapping[str, float] | None


class _Explain(TypedDict, total=False):
    targets: Sequence[str] | None  # labels to explain; default: the top-1
    contrast: str | None
    features: int  # listed per layer
    sources: bool
    source_features: int
    baseline: Literal["zero", "mean"]


class ExplainOptions(ClassifyOptions, _Explain, total=False):
    """The fields of `POST /v1/attribute`, including those of its `explain`."""

    heatmap: bool
    lens: bool
    matrix: bool
    residual: bool
    attention: Mapping[str, int] | None  # {"layer": 5, "head": 2}


class InterveneOptions(LabelOptions, _Explain, total=False):
    """The fields of `POST /v1/intervene`; an edit may be written as for the command, "ablate 7/123"."""

    edits: Sequence[str | Mapping[str, Any]]
    variants: Sequence[Sequence[str | Mapping[str, Any]]] | None
    counterfactual: str | Mapping[str, Any] | None
    mode: Mode


class CircuitOptions(LabelOptions, total=False):
    """The fields of `POST /v1/circuit`."""

    dictionary: Dictionary
    target: str | None  # default: the top-1
    contrast: str | None
    nodes: int | None  # maximum number of features to follow back
    seconds: float
    node_share: float
    edge_share: float
    leaves: bool


def request_of(shape: type[Shape], options: Mapping[str, Any]) -> Shape:
    """Options as a request. Raises `ServiceError`, which names the nearest name for one that is none."""
    outer, inner = names(shape)
    for name in options:
        if name not in (*outer, *inner):
            near = difflib.get_close_matches(name, [*outer, *inner], 1)
            hint = f"did you mean `{near[0]}`?" if near else f"the options are {', '.join(sorted([*outer, *inner]))}"
            raise ServiceError("invalid_request", f"`{name}` is not an option here; {hint}")
    fields = {name: _plain(options[name]) for name in outer if name in options}
    if explain := {name: _plain(options[name]) for name in inner if name in options}:
        fields["explain"] = explain
    if fields.get("edits"):
        fields["edits"] = [_edit(edit) for edit in fields["edits"]]
    if fields.get("variants"):
        fields["variants"] = [[_edit(edit) for edit in edits] for edits in fields["variants"]]
    with flat_names():
        return validated(shape, fields)


def names(shape: type[BaseModel]) -> tuple[list[str], list[str]]:
    """The fields of a request and those of its `explain`, which are options alike."""
    outer = [name for name in shape.model_fields if name != "explain"]
    inner: Any = shape.model_fields["explain"].annotation if "explain" in shape.model_fields else None
    return outer, list(inner.model_fields) if inner else []


@contextmanager
def flat_names() -> Iterator[None]:
    """A `ServiceError` from within speaks of `heatmap`, not of `explain.heatmap`."""
    try:
        yield
    except ServiceError as error:
        message = error.message.replace("explain.", "")
        if message == error.message:
            raise
        raise ServiceError(error.code, message, error.details, error.headers) from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _edit(edit: Any) -> Any:
    return parse(edit).model_dump(exclude_unset=True) if isinstance(edit, str) else edit
