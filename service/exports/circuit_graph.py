"""A circuit in the format of circuit-tracer's viewer and Neuronpedia (`service.exports.circuit_tracer`): features,
errors and embeddings at every token, and the links between them."""

from __future__ import annotations

import numpy as np

from vitrine.models.bundle.layout import Dictionary
from vitrine.service.exports.circuit_tracer import (
    ERROR,
    ESCAPES,
    FEATURE,
    Graph,
    Metadata,
    Node,
    logit_node,
    make_node,
    opened_at,
    prompt,
    scan,
)
from vitrine.service.schemas.circuit import CircuitNode, CircuitResponse

DEFINITIONS: dict[Dictionary, str] = {
    "clt": "A link is a direct effect on the logit, in logits, or on a feature's activation, with the attention "
    "weights and the denominators of all LayerNorms taken from this image. An error is what an MLP wrote at a token "
    "and the CLT does not explain.",
    "residual": "A link is a direct effect on the logit, in logits, or on a feature's activation, with the attention "
    "weights, the MLPs' gates and the denominators of all LayerNorms taken from this image. Features describe the "
    "stream after a block, and are made by those of the previous block. An error is what the stream contains at a "
    "token and its SAE does not explain.",
}
SUMS = (
    "The links into a feature, plus the `inflow` of its node in the settings, add up to the feature's activation; the "
    "links into the logit, plus its `inflow`, add up to the logit. `inflow` is what came from features that were not "
    "followed back, from what was pruned, and from biases and constants."
)


def circuit_graph(answer: CircuitResponse, image: str, slug: str, features: str) -> Graph:
    """The graph of a circuit, called `image` and, in its file's name, `slug`.

    features: folder of the features' files, relative to the viewer's page. Raises `CircuitError` unless the target is
    among the predictions.
    """
    tokens = ["[CLS]", *(f"p({row},{column})" for row in range(answer.rows) for column in range(answer.columns))]
    logit = logit_node(answer.predictions, answer.target, answer.contrast, answer.layers)
    influence = np.array([node.influence for node in answer.nodes])  # the largest first
    shares = np.minimum(np.cumsum(influence) / (influence.sum() or 1), 1)
    nodes = [
        _node(node, answer.dictionary, tokens, share) for node, share in zip(answer.nodes, shares.tolist(), strict=True)
    ]
    links: list[dict[str, str | float]] = [
        {
            "source": nodes[edge.source].node_id,
            "target": logit.node_id if edge.target is None else nodes[edge.target].node_id,
            "weight": edge.weight,
        }
        for edge in answer.edges
    ]
    inflow = {
        node.node_id: given.inflow.model_dump()
        for node, given in zip(nodes, answer.nodes, strict=True)
        if given.inflow is not None
    } | {logit.node_id: answer.inflow.model_dump()}
    metadata = Metadata(
        slug=slug,
        scan=scan(answer.model.name),
        transcoder_list=[features] * answer.layers,
        prompt_tokens=tokens,
        prompt=prompt(image, answer.target, answer.contrast),
        info={
            "description": f"{DEFINITIONS[answer.dictionary]} {SUMS}",
            "generator": {"name": "Vitrine"},
        },
        generation_settings={
            "model": answer.model.model_dump(),
            "dictionary": answer.dictionary,
            "target": answer.target,
            "contrast": answer.contrast,
            "logit": answer.logit,
            "scores": answer.scores.model_dump(),
            "followed": answer.followed,
            "active": answer.active,
            "kept": answer.kept,
            "inflow": inflow,
        },
    )
    return Graph(metadata=metadata, qParams=opened_at(logit), nodes=[*nodes, logit], links=links)


def _node(node: CircuitNode, dictionary: Dictionary, tokens: list[str], share: float) -> Node:
    if node.kind == "embedding":
        return make_node("embedding", "E", node.token, tokens[node.token], node.token, influence=share)
    if node.kind == "error":
        of = "MLP" if dictionary == "clt" else "stream after block"
        clerp = f"Err: {of} {node.layer} at {tokens[node.token]}"
        return make_node(ERROR, str(node.layer), -1, clerp, node.token, influence=share)
    assert node.index is not None
    clerp = (node.label or "").translate(ESCAPES)
    return make_node(
        FEATURE, str(node.layer), node.index, clerp, node.token, influence=share, activation=node.activation
    )
