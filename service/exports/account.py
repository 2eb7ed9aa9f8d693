"""The account of one image without a server: the answer, and on request a page or a graph that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import Dictionary
from vitrine.service.answers.attribute import answer_attribute
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.circuit import answer_circuit
from vitrine.service.answers.features import card
from vitrine.service.answers.intervene import answer_intervene
from vitrine.service.answers.residual import circuit_dictionaries
from vitrine.service.answers.sources import source_baselines
from vitrine.service.exports.circuit_page import draw_circuit, most_influential
from vitrine.service.exports.circuit_tracer import CircuitError, write_graphs
from vitrine.service.exports.page import draw_page
from vitrine.service.operations.settings import load_settings
from vitrine.service.schemas.attribute import AttributeRequest, AttributeResponse
from vitrine.service.schemas.base import Model
from vitrine.service.schemas.circuit import CircuitRequest, CircuitResponse
from vitrine.service.schemas.circuit_groups import GroupedCircuit
from vitrine.service.schemas.intervene import InterveneRequest, InterveneResponse

IDENTITY = "command-line"


async def account_for(
    bundle: Bundle, image: Path, request: AttributeRequest, *, with_page: bool = False, graph: Path | None = None
) -> tuple[AttributeResponse, str]:
    """(answer, page that shows it if `with_page`, else ""). graph: where to write its graph, NAME.json.

    Page and graph need more of the account than the request asks for, and send requests of their own. Raises
    `ServiceError`, `CircuitError`.
    """
    content = image.read_bytes()
    settings = load_settings().model_copy(update={"decode_threads": 1})  # there is one image
    async with Attributor(bundle, settings) as attributor:
        answer = await answer_attribute(attributor, content, request, IDENTITY)
        page = await page_for(attributor, content, request) if with_page else ""
        if graph is not None:
            if not bundle.manifest.has_features:
                raise CircuitError(f"a graph for circuit-tracer requires a CLT: {bundle.manifest.why_no_features}")
            labels = await attributor.label_set(request)
            full_request = _with_explain(request, heatmap=True, attention=None, features=bundle.manifest.shape.k)
            # all labels, so that the targets are among the predictions
            full_request = full_request.model_copy(update={"top_k": len(labels.labels)})
            full_answer = await answer_attribute(attributor, content, full_request, IDENTITY)
            write_graphs(graph, full_answer, image.name, bundle, labels, bundle.cards)
    return answer, page


async def circuits_for(
    bundle: Bundle, image: bytes, request: CircuitRequest, *, every: bool = False
) -> list[CircuitResponse]:
    """The circuit of one image's prediction; every: and those by the bundle's other dictionaries. Raises
    `ServiceError`."""
    settings = load_settings().model_copy(update={"decode_threads": 1})
    async with Attributor(bundle, settings) as attributor:
        others = circuit_dictionaries(attributor.engine) if every else []
        asked = dict.fromkeys([request.dictionary, *others])
        requests = [request.model_copy(update={"dictionary": dictionary}) for dictionary in asked]
        return [await answer_circuit(attributor, image, one, IDENTITY) for one in requests]


async def intervention_for(bundle: Bundle, image: Path, request: InterveneRequest) -> InterveneResponse:
    """One image with interventions. Raises `ServiceError`."""
    settings = load_settings().model_copy(update={"decode_threads": 1})
    async with Attributor(bundle, settings) as attributor:
        return await answer_intervene(attributor, image.read_bytes(), request, IDENTITY)


def circuit_page(bundle: Bundle, circuits: Sequence[GroupedCircuit], count: int, image: bytes | None) -> str:
    """The page of circuits' `count` most influential groups each, with the cards of their features."""
    model, cards = Model(name=bundle.manifest.name, digest=bundle.digest), {}
    for circuit in circuits:
        dictionary = circuit.dictionary
        if bundle.cards_of(dictionary):
            for one in most_influential(circuit, count).groups:
                if one.layer is not None and one.index is not None:
                    key = _key(dictionary, one.layer, one.index)
                    cards[key] = card(bundle, model, dictionary, one.layer, one.index)
    return draw_circuit(circuits, count, image, cards, bundle.manifest.preprocessing)


async def page_for(attributor: Attributor, content: bytes, request: AttributeRequest) -> str:
    """The page, with heat map and source account if the bundle provides them, and the cards of all listed features.

    Raises `ServiceError`.
    """
    bundle = attributor.bundle
    edited = attributor.edits.chosen(request.edit) is not None  # then there is the ledger alone
    explain: dict[str, Any] = {"heatmap": attributor.engine.has_details and not edited, "attention": None}
    if not edited and not request.explain.sources and (baselines := source_baselines(attributor.engine)):
        explain |= {"sources": True, "baseline": baselines[-1]}
    answer = await answer_attribute(attributor, content, _with_explain(request, **explain), IDENTITY)
    cards = {
        _key(*named): await attributor.query(card, bundle, attributor.model, *named)
        for named in sorted(_listed(answer))
        if bundle.cards_of(named[0])
    }
    return draw_page(answer, content, cards, bundle.manifest.preprocessing)


def _listed(answer: AttributeResponse) -> set[tuple[Dictionary, int, int]]:
    """(dictionary, layer, index) of all features that the answer lists."""
    listed: set[tuple[Dictionary, int, int]] = set()
    for explanation in answer.explanations:
        listed |= {("clt", layer.layer, feature.index) for layer in explanation.layers for feature in layer.features}
        if explanation.sources is not None:
            listed |= {("clt", feature.layer, feature.index) for feature in explanation.sources.features}
    for of_saes in answer.residual.layers if answer.residual else ():
        listed |= {("residual", of_saes.layer, feature.index) for feature in (*of_saes.cls, *of_saes.patches)}
    return listed


def _key(dictionary: Dictionary, layer: int, index: int) -> str:
    """By what a page knows a feature's card."""
    return f"{dictionary}/{layer}/{index}"


def _with_explain(request: AttributeRequest, **explain: Any) -> AttributeRequest:
    """The same request with other `explain` options."""
    return request.model_copy(update={"explain": request.explain.model_copy(update=explain)})
