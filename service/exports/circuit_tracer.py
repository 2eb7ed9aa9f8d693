"""One account as circuit-tracer's viewer and Neuronpedia read it: an attribution graph, and a file for each feature.

    graph    circuit-tracer's frontend/graph_models.py; Neuronpedia's app/api/graph/graph-schema.json
    feature  circuit-tracer's frontend/feature_models.py; Neuronpedia's app/api/graph/feature-details-schema.json

A graph explains one target's logit, or its difference from the contrast's. Its nodes are the image's tokens, the
features active at [CLS], the error row and the logit. Every link leads to the logit and is the row of its source
(`models.account.ledger`, `models.account.heatmap`), so that

    sum of the links + bias + attention's constants + remainder = the logit.

There are no links between features, though the format has room for them. Such a link would be a direct effect on
another feature's *activation*, with attention and layer norms held fast: that takes a pass back through the network,
which the service does not make. The logit's account lacks nothing without: all that reaches it does so directly.
"""

from __future__ import annotations

import re
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.cards import QUANTILES, Card, Cards
from vitrine.models.errors import VitrineError
from vitrine.service.engine.labels import LabelSet
from vitrine.service.schemas.attribute import AttributeResponse, Explanation, HeatMap

DEFINITION = (
    "A link is a direct effect on the logit, in logits: what its source wrote to [CLS]'s residual, through ln_post and "
    "the projection, with ln_post's sigma and the norm taken from this image. An embedding is what attention took from "
    "that token in all layers, [CLS] with the prior; the error is all layers'. Links, bias, attention's constants and "
    "remainder add up to the logit. Effects between features are not listed: the account of [CLS] is direct."
)
FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"
RANKED = 10  # labels at either end of a feature's ranking
# Viewers write a clerp into the page as HTML, and take the logit's name from between the first two quotation marks.
HARMLESS = str.maketrans({'"': "”", "<": "‹", ">": "›", "\n": "⏎", "\t": "→", "\r": "↵"})


class CircuitError(VitrineError, ValueError):
    """An answer cannot be exported; the message says why."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Metadata(_Part):
    slug: str
    scan: str
    transcoder_list: list[str]  # one per layer
    prompt_tokens: list[str]
    prompt: str
    node_threshold: float = 1  # nothing is hidden before the reader moves the slider
    schema_version: int = 1  # features are numbered by `feature_number`
    info: dict[str, Any]
    generation_settings: dict[str, Any]  # the schema leaves its keys to the writer: what is no link


class Node(_Part):
    node_id: str
    feature: int
    layer: str
    ctx_idx: int
    feature_type: str
    token_prob: float = 0
    is_target_logit: bool = False
    run_idx: int = 0
    reverse_ctx_idx: int = 0
    jsNodeId: str
    clerp: str
    influence: float | None = None  # its |weight| and all larger ones, as a part of all: circuit-tracer's graph.py
    activation: float | None = None


class Graph(_Part):
    metadata: Metadata
    qParams: dict[str, Any]  # the viewer's state: with the logit chosen it opens with all links
    nodes: list[Node]
    links: list[dict[str, str | float]]  # source, target, weight


class FeatureDetails(_Part):
    transcoder_id: str
    index: int
    examples_quantiles: list[dict[str, Any]]
    top_logits: list[str]
    bottom_logits: list[str]
    act_min: float = 0
    act_max: float
    quantile_values: list[float]  # percentiles 1 to 100
    histogram: list[int]
    activation_frequency: float


def feature_number(layer: int, index: int) -> int:
    """Cantor's pairing: the place of (layer, index) along the diagonals layer + index = 0, 1, ..., by index in each."""
    diagonal = layer + index
    return diagonal * (diagonal + 1) // 2 + index


def attribution_graph(answer: AttributeResponse, told: Explanation, image: str, slug: str, features: str) -> Graph:
    """The graph of one explanation, called `image` and, in its file's name, `slug`.

    features: where the viewer finds the features' files, relative to its page. Raises `CircuitError` unless the answer
    has the heat map, every active feature (`explain.features` of k), and the target among its predictions.
    """
    heatmap, bias, against = _checked(told), told.ledger.bias, told.contrast
    tokens = ["[CLS]", *(f"p({row},{column})" for row in range(heatmap.rows) for column in range(heatmap.columns))]
    sources, logit = _sources(told, heatmap, tokens), _logit(answer, told)
    links: list[dict[str, str | float]] = [
        {"source": node.node_id, "target": logit.node_id, "weight": weight} for node, weight in sources
    ]
    shown = image.encode(errors="replace").decode()  # a file's name may hold bytes that are no text
    what = {"model": answer.model.model_dump(), "target": told.target, "contrast": against, "logit": told.logit}
    # Rounding; with the int8 or fp16 graph also what those change in attention's output products.
    remainder = told.logit - fsum([bias, *heatmap.constant, *(weight for _, weight in sources)])
    metadata = Metadata(
        slug=slug,
        # "custom-": the viewer asks the layer's entry in `transcoder_list` for a feature, and no server far away
        scan="custom-" + re.sub(r"[^A-Za-z0-9_.-]", "-", answer.model.name),
        transcoder_list=[features] * len(told.layers),
        prompt_tokens=tokens,
        prompt=f"{shown}: why {told.target}" + (f" rather than {against}" if against else ""),
        info={"description": DEFINITION, "generator": {"name": "Vitrine"}},
        generation_settings=what | {"bias": bias, "attention_constants": heatmap.constant, "remainder": remainder},
    )
    state = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": logit.node_id, "sg_pos": ""}
    return Graph(metadata=metadata, qParams=state, nodes=[*(node for node, _ in sources), logit], links=links)


def _checked(told: Explanation) -> HeatMap:
    """The heat map. Raises `CircuitError` if there is none, or if features are missing."""
    if told.heatmap is None:
        raise CircuitError(f"the account of {told.target!r} has no heat map: ask with `explain.heatmap`")
    for layer in told.layers:
        listed = [feature.contribution for feature in layer.features]
        if abs(layer.contribution - fsum(listed)) > 1e-3 * fsum(map(abs, listed)) + 1e-6:
            raise CircuitError(f"layer {layer.layer} lists {len(listed)} of its features: ask for all of them")
    return told.heatmap


def _sources(told: Explanation, heatmap: HeatMap, tokens: list[str]) -> list[tuple[Node, float]]:
    """All nodes but the logit, each with its direct effect. The error, which is all layers', stands in the last."""
    taken = zip(tokens, [fsum([told.ledger.prior, *heatmap.class_token]), *heatmap.total], strict=True)
    found = [(_node("embedding", "E", place, name, place), weight) for place, (name, weight) in enumerate(taken)]
    for layer in told.layers:
        for one in layer.features:
            label = (one.label or "").translate(HARMLESS)
            node = _node(FEATURE, str(layer.layer), one.index, label, activation=one.activation)
            found.append((node, one.contribution))
    found.append((_node(ERROR, str(len(told.layers) - 1), -1, "Err: MLPs of all layers"), told.ledger.error))
    sizes = np.abs([weight for _, weight in found])
    order = np.argsort(-sizes, kind="stable")
    shares = np.minimum(np.cumsum(sizes[order]) / (sizes.sum() or 1), 1)  # beyond 1, by rounding, is hidden
    for place, share in zip(order, shares, strict=True):
        found[place][0].influence = float(share)
    return found


def _logit(answer: AttributeResponse, told: Explanation) -> Node:
    """The target's node. It is label 0: answers do not number labels."""
    chances = {prediction.label: prediction.probability for prediction in answer.predictions}
    if (chance := chances.get(told.target)) is None:
        raise CircuitError(f"{told.target!r} is not among the predictions: ask with a larger `top_k`")
    name = (told.target + (f" - {told.contrast}" if told.contrast else "")).translate(HARMLESS)
    clerp, layer = f'Output "{name}" (p={chance:.3f})', str(len(told.layers) + 1)
    return _node("logit", layer, 0, clerp, token_prob=chance, is_target_logit=True)


def _node(kind: str, layer: str, number: int, clerp: str, place: int = 0, **more: Any) -> Node:
    """By circuit-tracer's ids. number: of the token, feature or label in its layer; an error's is -1."""
    more["jsNodeId"] = f"{'L' if kind == 'logit' else layer}_{number}-{place}"
    more["feature"] = feature_number(int(layer), number) if kind == FEATURE else number
    return Node(node_id=f"{layer}_{number}_{place}", layer=layer, ctx_idx=place, feature_type=kind, clerp=clerp, **more)


def feature_details(card: Card, transcoder: str, tokens: list[str], ranked: list[str]) -> FeatureDetails:
    """The file of one feature, with |activations| as in its card; percentiles between its quantiles are interpolated.

    tokens: [CLS] and the patches; ranked: labels, the one that the feature's direction adds most to first.
    """
    ends, at_cls = min(RANKED, len(ranked) // 2), card.read_at == "cls"
    known = [-card.largest if min(card.quantiles, default=0) < 0 else 0, *card.quantiles, card.largest]
    percentiles = np.interp(np.arange(1, 101) / 100, [0, *QUANTILES, 1], known).tolist() if card.quantiles else []
    return FeatureDetails(
        transcoder_id=transcoder,
        index=card.index,
        examples_quantiles=[{"quantile_name": "Top activations", "examples": _examples(card, tokens, at_cls)}],
        top_logits=[*ranked[:ends]],
        bottom_logits=[*ranked[::-1][:ends]],
        act_max=card.largest,
        quantile_values=percentiles,
        histogram=card.histogram,
        activation_frequency=card.frequency_cls if at_cls else card.frequency_patches,
    )


def _examples(card: Card, tokens: list[str], at_cls: bool) -> list[dict[str, Any]]:
    """Without [CLS] where the feature is read at patches: its card does not say what it does at [CLS]."""
    found = []
    for exemplar in card.exemplars:
        acts = [float(f"{level * card.mask_scale / 255:.4g}") for level in exemplar.mask]  # of a byte
        acts, middle = ([abs(exemplar.activation), *acts], 0) if at_cls else (acts, int(np.argmax(acts)))
        names = {"tokens": tokens[not at_cls :], "tokens_acts_list": acts}
        found.append({**names, "train_token_ind": middle, "is_repeated_datapoint": False})
    return found


def write_graphs(
    path: Path, answer: AttributeResponse, image: str, bundle: Bundle, labels: LabelSet, cards: Cards | None
) -> list[Path]:
    """Write the graph of each explanation; returns where: `path`, NAME.json, and beside it NAME-2.json, ...

    With cards, NAME-features/ gets a file for each feature, with the `labels` that its direction adds most and least
    to. Raises `CircuitError` before anything is written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+\.json", path.name):
        raise CircuitError(f"{path.name!r}: viewers read NAME.json, NAME of letters, digits, '.', '-' and '_' alone")
    folder = path.with_name(f"{path.stem}-features")
    place = f"./data/{folder.name}" if cards else "./data/none"  # not what an earlier export left there
    graphs = {}
    for number, told in enumerate(answer.explanations, 1):
        file = path if number == 1 else path.with_name(f"{path.stem}-{number}.json")
        graphs[file] = attribution_graph(answer, told, image, file.stem, place)
    features = _features(answer, bundle, labels, cards, graphs[path].metadata.prompt_tokens) if cards else {}
    for file, content in [*graphs.items(), *((folder / name, details) for name, details in features.items())]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content.model_dump_json() + "\n", encoding="utf-8")
    return list(graphs)


def _features(
    answer: AttributeResponse, bundle: Bundle, labels: LabelSet, cards: Cards, tokens: list[str]
) -> dict[str, FeatureDetails]:
    """By the file's name. All of an answer's explanations list the same features, whichever label they explain."""
    found, toward = {}, bundle.fold @ labels.embeddings.T  # [d, N]
    for layer in answer.explanations[0].layers:
        for one in layer.features:
            effects = bundle.directions[layer.layer, one.index] @ toward
            ranked = [labels.labels[place] for place in np.argsort(-effects, kind="stable")]
            card, transcoder = cards.card(layer.layer, one.index), f"{answer.model.digest}/{layer.layer}"
            found[f"{feature_number(layer.layer, one.index)}.json"] = feature_details(card, transcoder, tokens, ranked)
    return found
