"""Routes for the bundle, its label sets and its features."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.convertors import Convertor, register_url_convertor
from starlette.responses import Response

from vitrine.service.answers.attention import attention_heads
from vitrine.service.answers.features import card, card_dictionaries, search
from vitrine.service.answers.residual import circuit_dictionaries
from vitrine.service.answers.sources import source_baselines
from vitrine.service.http.asking import json_response, lease_attributor
from vitrine.service.http.openapi import errors, query_parameters
from vitrine.service.schemas.base import validated
from vitrine.service.schemas.bundle import LabelSetResponse, LabelsResponse, ModelResponse
from vitrine.service.schemas.features import CardQuery, CardResponse, FeaturesQuery, FeaturesResponse

MOST_DIGITS = 9  # of a layer or an index; more name nothing


class NumberConvertor(Convertor[int]):
    """A number in a path. Of those with more digits than `MOST_DIGITS` any that names nothing will do: Starlette's own
    converter fails at 4,300 digits, as Python's `int` does, before a key is asked for."""

    regex = "[0-9]+"

    def convert(self, value: str) -> int:
        return int(value) if len(value) <= MOST_DIGITS else 10**MOST_DIGITS

    def to_string(self, value: int) -> str:
        return str(value)


register_url_convertor("number", NumberConvertor())


def add_knowledge(app: FastAPI) -> None:
    """`/v1/model`, `/v1/labels`, `/v1/features`, `/v1/features/{layer}/{index}`."""
    known = errors(401, 503)
    app.get(
        "/v1/model",
        summary="Describe the bundle in service and what it supports",
        response_model=ModelResponse,
        responses=known,
        tags=["know"],
    )(model)
    app.get(
        "/v1/labels",
        summary="List the named label sets",
        response_model=LabelsResponse,
        responses=known,
        tags=["know"],
    )(labels)
    app.get(
        "/v1/features",
        summary="Find features by their labels",
        response_model=FeaturesResponse,
        responses=errors(400, 401, 404, 503),
        openapi_extra=query_parameters(FeaturesQuery),
        tags=["know"],
    )(features)
    # With these converters, what is not a number gets the 404 of unknown paths.
    app.get(
        "/v1/features/{layer:number}/{index:number}",
        summary="Show the card of one feature",
        response_model=CardResponse,
        responses=errors(400, 401, 404, 503),
        openapi_extra=query_parameters(CardQuery),
        tags=["know"],
    )(feature)


async def model(request: Request) -> Response:
    """The bundle in service, with its manifest."""
    with lease_attributor(request) as attributor:
        return json_response(
            ModelResponse(
                **attributor.model.model_dump(),
                provider=attributor.engine.provider,
                precision=attributor.engine.runtime.precision,
                manifest=attributor.bundle.manifest.model_dump(mode="json"),
                source_baselines=source_baselines(attributor.engine),
                attention_heads=attention_heads(attributor.engine),
                circuit_dictionaries=circuit_dictionaries(attributor.engine),
                interventions=attributor.engine.interventions,
                card_dictionaries=card_dictionaries(attributor.bundle),
                edits=[served.summary for served in attributor.edits.named.values()],
                default_edit=attributor.edits.default,
            )
        )


async def labels(request: Request) -> Response:
    """The named label sets."""
    with lease_attributor(request) as attributor:
        sets = [
            LabelSetResponse(name=name, labels=list(named.labels), templates=list(named.templates or ()))
            for name, named in attributor.labels.named.items()
        ]
        return json_response(LabelsResponse(model=attributor.model, label_sets=sets))


async def features(request: Request) -> Response:
    """Labelled features, best label first; with `label`, those whose label contains it."""
    with lease_attributor(request) as attributor:
        query = validated(FeaturesQuery, dict(request.query_params))
        return json_response(await attributor.query(search, attributor.bundle, attributor.model, query))


async def feature(request: Request, layer: int, index: int) -> Response:
    """What is known about one feature: its label, if one was good enough, exemplars and statistics."""
    with lease_attributor(request) as attributor:
        query = validated(CardQuery, dict(request.query_params))
        found = attributor.query(card, attributor.bundle, attributor.model, query.dictionary, layer, index)
        return json_response(await found)
