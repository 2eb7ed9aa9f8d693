"""The circuit of one logit: followed back from the most influential features, batch by batch, between other work."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account import ledger
from vitrine.models.account.circuit import AttributionGraph, Coded, Expansion, Limits, Wanted
from vitrine.models.account.pruning import Circuit, prune
from vitrine.models.account.sources import Sources
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.manifest import patch_grid
from vitrine.service.answers.answer_size import check_answer_size
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.explain import check_explain, predict
from vitrine.service.answers.notices import to_notices, unlike_labels
from vitrine.service.answers.residual import check_residual
from vitrine.service.answers.sources import directions
from vitrine.service.answers.texts import Texts
from vitrine.service.errors import ServiceError
from vitrine.service.operations.settings import Settings
from vitrine.service.operations.stages import timed_stage
from vitrine.service.schemas.attribute import Explain
from vitrine.service.schemas.circuit import (
    CircuitEdge,
    CircuitInflow,
    CircuitNode,
    CircuitRequest,
    CircuitResponse,
    CircuitScores,
    Dictionary,
)

if TYPE_CHECKING:
    from vitrine.models.bundle.cards import Cards


class Graphs(Protocol):
    """A dictionary's graphs: `service.engine.sources` or `service.engine.residual`."""

    def target(self, pixels: NDArray[np.float32], direction: NDArray[np.floating]) -> tuple[Coded, Sources]:
        """An image's trace, and the account of one direction [1, D]."""

    def of_features(self, trace: Any, wanted: Wanted) -> list[Sources]:
        """The accounts of features' pre-activations."""


NODE_VALUES, EDGE_VALUES = 15, 3  # of a node and of an edge in the answer
# Features followed by default. From a logit to the first residual SAE the way leads through all others: of ViT-Ti/16's
# eleven, 256 features reach the uppermost three, 2,048 six or seven (loadtests/RESULTS.md).
FOLLOWED: dict[Dictionary, int] = {"clt": 256, "residual": 2048}
# What VITRINE_MAX_CIRCUIT_NODES counts for: edges come from the features of all layers below, or of one.
TIMES_ALLOWED: dict[Dictionary, int] = {"clt": 1, "residual": 4}


async def answer_circuit(
    attributor: Attributor, image: bytes, request: CircuitRequest, request_id: str
) -> CircuitResponse:
    """The pruned attribution graph of one logit. Raises `ServiceError`."""
    bundle, (texts, explain) = attributor.bundle, check_circuit(attributor, request)
    graphs = attributor.engine.sources if request.dictionary == "clt" else attributor.engine.residual
    assert graphs is not None  # see `check_circuit`
    timings: dict[str, float] = {}
    with attributor.admit():
        await attributor.check_labels(texts, request.strict)
        inferred = await attributor.infer(image, *texts, timings)
        labels, scale = inferred.labels, bundle.manifest.logit_scale
        top1 = int(ledger.logits(inferred.parts.embedding, labels.embeddings, scale).argmax())
        of = directions(labels, explain, top1)
        async with attributor.one_circuit:  # each takes memory for all edges into every feature that is followed
            with timed_stage("circuit", timings):
                await attributor.open(graphs)
                allowed = _allowed(attributor.settings, request.dictionary)
                nodes = min(FOLLOWED[request.dictionary], allowed) if request.nodes is None else request.nodes
                limits = Limits(nodes, request.seconds)
                graph, target = await _followed(attributor, graphs, inferred.pixels, of, limits)
                pruning = partial(prune, graph, request.node_share, request.edge_share, leaves=request.leaves)
                circuit = await attributor.in_thread(pruning)
                _check_size(attributor, circuit)
                cards = bundle.cards_of(request.dictionary)
                answer = await attributor.in_thread(_parts, bundle, cards, graph, circuit, target.logit)
        predictions = await attributor.in_thread(predict, inferred.parts, labels, scale, request.top_k)
    return CircuitResponse(
        request_id=request_id,
        model=attributor.model,
        warnings=[*inferred.warnings, *to_notices(image=unlike_labels(bundle.manifest.text.fit, predictions))],
        dictionary=request.dictionary,
        predictions=predictions,
        target=request.target or labels.labels[top1],
        contrast=request.contrast,
        logit=target.logit,
        timings_ms=timings,
        **answer,
    )


def check_circuit(attributor: Attributor, request: CircuitRequest) -> tuple[Texts, Explain]:
    """What is asked, as labels and as a source account. Raises `ServiceError` invalid_request."""
    settings, texts = attributor.settings, attributor.texts(request)
    by_clt, targets = request.dictionary == "clt", [request.target] if request.target else None
    explain = Explain(targets=targets, contrast=request.contrast, sources=by_clt)
    if by_clt and not attributor.bundle.manifest.has_features:
        why = attributor.bundle.manifest.why_no_features
        raise ServiceError("invalid_request", f"a circuit requires a CLT, unless `dictionary` is residual: {why}")
    if not by_clt:
        check_residual("`dictionary` residual", attributor.bundle, enabled=attributor.engine.residual is not None)
    check_explain(explain, texts[0], settings.max_targets, attributor.engine)
    allowed = _allowed(settings, request.dictionary)
    if request.nodes is not None and request.nodes > allowed:
        raise ServiceError(
            "invalid_request", f"`nodes` is {request.nodes:,}; at most {allowed:,} features are followed back"
        )
    return texts, explain


def _allowed(settings: Settings, dictionary: Dictionary) -> int:
    """Features that a request may have followed."""
    return settings.max_circuit_nodes * TIMES_ALLOWED[dictionary]


async def _followed(
    attributor: Attributor,
    graphs: Graphs,
    pixels: NDArray[np.float32],
    direction: NDArray[np.floating],
    limits: Limits,
) -> tuple[AttributionGraph, Sources]:
    """(the graph, the target's account), a batch of features at a time: images of other requests go between."""
    trace, target = await attributor.batcher.run_between(graphs.target, pixels, direction, spent=0.0)
    expansion, spent = Expansion(trace, target, limits), 0.0
    while (wanted := await attributor.in_thread(expansion.wanted)) is not None:
        found = await attributor.batcher.run_between(graphs.of_features, trace, wanted, spent=spent)
        await attributor.in_thread(expansion.add, found)
        spent += len(found)
    return expansion.graph, target


def _check_size(attributor: Attributor, circuit: Circuit) -> None:
    """Raise `ServiceError` answer_too_large."""
    values = NODE_VALUES * len(circuit.nodes) + EDGE_VALUES * len(circuit.weights)
    check_answer_size(values, attributor.settings.max_answer_values, "set a smaller `node_share` or `edge_share`")


def _parts(
    bundle: Bundle, cards: Cards | None, graph: AttributionGraph, circuit: Circuit, logit: float
) -> dict[str, Any]:
    """The fields of the answer that are the graph's."""
    leaves = graph.leaves
    active = int(np.count_nonzero(graph.activations))
    kept = int((circuit.nodes < graph.shape.features).sum())
    rows, columns = patch_grid(bundle.manifest.preprocessing, graph.shape.tokens - 1)
    targets = [None if place < 0 else place for place in circuit.targets.tolist()]
    edges = zip(circuit.sources.tolist(), targets, circuit.weights.tolist(), strict=True)
    return {
        "nodes": _nodes(cards, graph, circuit),
        "edges": [CircuitEdge(source=source, target=target, weight=weight) for source, target, weight in edges],
        "inflow": _inflow(circuit, -1, logit),
        "scores": CircuitScores(
            embeddings=leaves.embeddings,
            errors=leaves.errors,
            left_out=leaves.left_out,
            constant=leaves.constant,
            replacement=leaves.replacement,
            completeness=graph.completeness,
        ),
        "followed": len(graph.expanded),
        "active": active,
        "kept": kept,
        "kept_share": kept / active if active else 0.0,
        "layers": graph.shape.layers,
        "rows": rows,
        "columns": columns,
    }


def _nodes(cards: Cards | None, graph: AttributionGraph, circuit: Circuit) -> list[CircuitNode]:
    shape = graph.shape
    straight = graph.target[circuit.nodes] * graph.target_gross
    followed = np.isin(circuit.nodes, graph.expanded)
    columns: list[NDArray[Any]] = [circuit.nodes, shape.token_of(circuit.nodes), circuit.influence, straight, followed]
    nodes: list[CircuitNode] = []
    for column, token, influence, contribution, is_followed in zip(*(part.tolist() for part in columns), strict=True):
        layer = index = activation = label = score = None
        kind = _kind(graph, column)
        if kind == "feature":
            layer = int(shape.layer_of(np.array(column)))
            index, activation = int(graph.indices.flat[column]), float(graph.activations.flat[column])
            label, score = cards.label(layer, index) if cards else (None, None)
        elif kind == "error":
            layer = (column - shape.errors) // shape.tokens
        nodes.append(
            CircuitNode(
                kind=kind,
                layer=layer,
                index=index,
                token=token,
                influence=influence,
                contribution=contribution,
                activation=activation,
                followed=is_followed,
                inflow=None if activation is None or not is_followed else _inflow(circuit, len(nodes), activation),
                label=label,
                label_score=score,
            )
        )
    return nodes


def _inflow(circuit: Circuit, place: int, total: float) -> CircuitInflow:
    """Of a followed node, or of the target (-1); total: its activation or logit."""
    inflow = circuit.inflow
    return CircuitInflow(
        unfollowed=float(inflow.unfollowed[place]),
        unfollowed_share=float(inflow.unfollowed_share[place]),
        pruned=float(inflow.pruned[place]),
        pruned_share=float(inflow.pruned_share[place]),
        constant=total - float(inflow.edges[place]),
    )


def _kind(graph: AttributionGraph, column: int) -> Literal["feature", "embedding", "error"]:
    if column < graph.shape.features:
        return "feature"
    return "embedding" if column < graph.shape.errors else "error"
