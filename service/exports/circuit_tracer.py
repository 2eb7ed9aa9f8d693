"""One account in the format of circuit-tracer's viewer and Neuronpedia: an attribution graph, and a file per feature.

    graph    circuit-tracer's frontend/graph_models.py; Neuronpedia's app/api/graph/graph-schema.json
    feature  circuit-tracer's frontend/feature_models.py; Neuronpedia's app/api/graph/feature-details-schema.json

A graph explains one target's logit, or its difference from the contrast's. Its nodes are the image's tokens, the
features active at [CLS], the error row and the logit. Every link leads to the logit and is the row of its source
(`models.account.ledger`, `models.account.heatmap`), so that

    sum of the links + bias + attention's constants + remainder = the logit.

There are no links between features here: everything that reaches the logit does so directly, through [CLS]. Links
between features at all tokens are those of a circuit (`service.exports.circuit_graph`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.cards import QUANTILES, Card, Cards
from vitrine.models.errors import VitrineError
from vitrine.models.files.problems import naming
from vitrine.models.files.writing import write_text
from vitrine.service.engine.labels import LabelSet
from vitrine.service.schemas.attribute import AttributeResponse, Explanation, HeatMap
from vitrine.service.schemas.classify import Prediction

DEFINITION = (
    "A link is a direct effect on the logit, in logits: what its source wrote to the residual at [CLS], through "
    "ln_post and the projection, with ln_post's sigma and the norm taken from this image. An embedding is what "
    "attention took from that token in all layers (for [CLS], with the prior); the error is that of all layers. Links, "
    "bias, attention's constants and remainder add up to the logit. Effects between features are not listed, because "
    "the account of [CLS] is direct."
)
FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"
RANKED_LABELS = 10  # labels listed at each end of a feature's ranking
# Viewers insert a clerp into the page as HTML, and take the logit's name from between the first two quotation marks.
ESCAPES = str.maketrans({'"': "”", "<": "‹", ">": "›", "\n": "⏎", "\t": "→", "\r": "↵"})


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
    generation_settings: dict[str, Any]  # free-form in the schema: everything that is not a link


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
    influence: float | None = None  # share of its |weight| and all larger ones in the total: circuit-tracer's graph.py
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
    """Cantor's pairing: position of (layer, index) along the diagonals layer + index = 0, 1, ..., by index in each."""
    diagonal = layer + index
    return diagonal * (diagonal + 1) // 2 + index


def attribution_graph(
    answer: AttributeResponse, explanation: Explanation, image: str, slug: str, features: str
) -> Graph:
    """The graph of one explanation, called `image` and, in its file's name, `slug`.

    features: folder of the features' files, relative to the viewer's page. Raises `CircuitError` unless the answer has
    the heat map, every active feature (`explain.features` of k), and the target among its predictions.
    """
    heatmap, bias, contrast = _require_heat_map(explanation), explanation.ledger.bias, explanation.contrast
    tokens = ["[CLS]", *(f"p({row},{column})" for row in range(heatmap.rows) for column in range(heatmap.columns))]
    sources = _sources(explanation, heatmap, tokens)
    logit = logit_node(answer.predictions, explanation.target, contrast, len(explanation.layers))
    links: list[dict[str, str | float]] = [
        {"source": node.node_id, "target": logit.node_id, "weight": weight} for node, weight in sources
    ]
    settings = {
        "model": answer.model.model_dump(),
        "target": explanation.target,
        "contrast": contrast,
        "logit": explanation.logit,
    }
    # Rounding; with the int8 or fp16 graph also their changes to attention's output products.
    remainder = explanation.logit - fsum([bias, *heatmap.constant, *(weight for _, weight in sources)])
    metadata = Metadata(
        slug=slug,
        scan=scan(answer.model.name),
        transcoder_list=[features] * len(explanation.layers),
        prompt_tokens=tokens,
        prompt=prompt(image, explanation.target, contrast),
        info={"description": DEFINITION, "generator": {"name": "Vitrine"}},
        generation_settings=settings | {"bias": bias, "attention_constants": heatmap.constant, "remainder": remainder},
    )
    nodes = [*(node for node, _ in sources), logit]
    return Graph(metadata=metadata, qParams=opened_at(logit), nodes=nodes, links=links)


def scan(bundle: str) -> str:
    """What stands for the model. "custom-": the viewer loads a feature from the layer's entry in `transcoder_list`, not
    from a remote server."""
    return "custom-" + re.sub(r"[^A-Za-z0-9_.-]", "-", bundle)


def prompt(image: str, target: str, contrast: str | None) -> str:
    """What was asked of an image, by its file's name, which may contain bytes that are not text."""
    name = image.encode(errors="replace").decode()
    return f"{name}: why {target}" + (f" rather than {contrast}" if contrast else "")


def opened_at(logit: Node) -> dict[str, Any]:
    """The viewer's state at first."""
    return {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": logit.node_id, "sg_pos": ""}


def _require_heat_map(explanation: Explanation) -> HeatMap:
    """The explanation's heat map. Raises `CircuitError` if there is none, or if features are missing."""
    if explanation.heatmap is None:
        raise CircuitError(f"the account of {explanation.target!r} has no heat map; request it with `explain.heatmap`")
    for layer in explanation.layers:
        listed = [feature.contribution for feature in layer.features]
        if abs(layer.contribution - fsum(listed)) > 1e-3 * fsum(map(abs, listed)) + 1e-6:
            raise CircuitError(
                f"layer {layer.layer} lists only {len(listed)} of its features; set `explain.features` to list all of "
                "them"
            )
    return explanation.heatmap


def _sources(explanation: Explanation, heatmap: HeatMap, tokens: list[str]) -> list[tuple[Node, float]]:
    """All nodes but the logit, each with its direct effect. The error of all layers is placed in the last one."""
    embeddings = zip(tokens, [fsum([explanation.ledger.prior, *heatmap.class_token]), *heatmap.total], strict=True)
    sources = [
        (make_node("embedding", "E", place, name, place), weight) for place, (name, weight) in enumerate(embeddings)
    ]
    for layer in explanation.layers:
        for feature in layer.features:
            label = (feature.label or "").translate(ESCAPES)
            node = make_node(FEATURE, str(layer.layer), feature.index, label, activation=feature.activation)
            sources.append((node, feature.contribution))
    sources.append(
        (make_node(ERROR, str(len(explanation.layers) - 1), -1, "Err: MLPs of all layers"), explanation.ledger.error)
    )
    sizes = np.abs([weight for _, weight in sources])
    order = np.argsort(-sizes, kind="stable")
    # At most 1: viewers hide shares beyond, which rounding can give.
    shares = np.minimum(np.cumsum(sizes[order]) / (sizes.sum() or 1), 1)
    for place, share in zip(order, shares, strict=True):
        sources[place][0].influence = float(share)
    return sources


def logit_node(predictions: Sequence[Prediction], target: str, contrast: str | None, layers: int) -> Node:
    """The target's node. Its number is 0, as answers do not number labels."""
    probabilities = {prediction.label: prediction.probability for prediction in predictions}
    if (probability := probabilities.get(target)) is None:
        raise CircuitError(f"{target!r} is not among the predictions; set a larger `top_k`")
    name = (target + (f" - {contrast}" if contrast else "")).translate(ESCAPES)
    clerp = f'Output "{name}" (p={probability:.3f})'
    return make_node("logit", str(layers + 1), 0, clerp, token_prob=probability, is_target_logit=True)


def make_node(kind: str, layer: str, number: int, clerp: str, place: int = 0, **more: Any) -> Node:
    """A node with circuit-tracer's ids. number: of the token, feature or label in its layer; -1 for an error."""
    more["jsNodeId"] = f"{'L' if kind == 'logit' else layer}_{number}-{place}"
    more["feature"] = feature_number(int(layer), number) if kind == FEATURE else number
    return Node(node_id=f"{layer}_{number}_{place}", layer=layer, ctx_idx=place, feature_type=kind, clerp=clerp, **more)


def feature_details(card: Card, transcoder: str, tokens: list[str], ranked: list[str]) -> FeatureDetails:
    """The file of one feature, with |activations| as in its card; percentiles are interpolated between its quantiles.

    tokens: [CLS] and the patches; ranked: labels, starting with the one that the feature's direction adds most to.
    """
    count, at_cls = min(RANKED_LABELS, len(ranked) // 2), card.read_at == "cls"
    values = [-card.largest if min(card.quantiles, default=0) < 0 else 0, *card.quantiles, card.largest]
    percentiles = np.interp(np.arange(1, 101) / 100, [0, *QUANTILES, 1], values).tolist() if card.quantiles else []
    return FeatureDetails(
        transcoder_id=transcoder,
        index=card.index,
        examples_quantiles=[{"quantile_name": "Top activations", "examples": _examples(card, tokens, at_cls)}],
        top_logits=[*ranked[:count]],
        bottom_logits=[*ranked[::-1][:count]],
        act_max=card.largest,
        quantile_values=percentiles,
        histogram=card.histogram,
        activation_frequency=card.frequency_cls if at_cls else card.frequency_patches,
    )


def _examples(card: Card, tokens: list[str], at_cls: bool) -> list[dict[str, Any]]:
    """The exemplars, without [CLS] if the feature is read at patches: its card does not tell its value at [CLS]."""
    examples = []
    for exemplar in card.exemplars:
        acts = [float(f"{level * card.mask_scale / 255:.4g}") for level in exemplar.mask]  # from a byte
        acts, middle = ([abs(exemplar.activation), *acts], 0) if at_cls else (acts, int(np.argmax(acts)))
        names = {"tokens": tokens[not at_cls :], "tokens_acts_list": acts}
        examples.append({**names, "train_token_ind": middle, "is_repeated_datapoint": False})
    return examples


def write_graphs(
    path: Path, answer: AttributeResponse, image: str, bundle: Bundle, labels: LabelSet, cards: Cards | None
) -> list[Path]:
    """Write the graph of each explanation; returns the files: `path`, NAME.json, and beside it NAME-2.json, ...

    With cards, NAME-features/ gets a file per feature, with the `labels` that its direction adds most and least
    to. Raises `CircuitError` before anything is written, `FileError` if a file cannot be.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+\.json", path.name):
        raise CircuitError(
            f"viewers cannot read {path.name!r}; name the file NAME.json with only letters, digits, '.', '-' and '_'"
        )
    folder = path.with_name(f"{path.stem}-features")
    features_url = f"./data/{folder.name}" if cards else "./data/none"  # no files of an earlier export
    graphs = {}
    for number, explanation in enumerate(answer.explanations, 1):
        file = path if number == 1 else path.with_name(f"{path.stem}-{number}.json")
        graphs[file] = attribution_graph(answer, explanation, image, file.stem, features_url)
    features = _features(answer, bundle, labels, cards, graphs[path].metadata.prompt_tokens) if cards else {}
    for file, content in [*graphs.items(), *((folder / name, details) for name, details in features.items())]:
        with naming(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, content.model_dump_json() + "\n")
    return list(graphs)


def _features(
    answer: AttributeResponse, bundle: Bundle, labels: LabelSet, cards: Cards, tokens: list[str]
) -> dict[str, FeatureDetails]:
    """Features by file name. All of an answer's explanations list the same features, whichever label they explain."""
    details, fold_to_labels = {}, bundle.fold @ labels.embeddings.T  # [d, N]
    for layer in answer.explanations[0].layers:
        for feature in layer.features:
            effects = bundle.directions[layer.layer, feature.index] @ fold_to_labels
            ranked = [labels.labels[place] for place in np.argsort(-effects, kind="stable")]
            card, transcoder = cards.card(layer.layer, feature.index), f"{answer.model.digest}/{layer.layer}"
            details[f"{feature_number(layer.layer, feature.index)}.json"] = feature_details(
                card, transcoder, tokens, ranked
            )
    return details
