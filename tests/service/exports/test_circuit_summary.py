"""A circuit summed over tokens, by hand, and printed."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from vitrine.service.exports.circuit_summary import grouped, print_circuit
from vitrine.service.schemas.circuit import CircuitEdge, CircuitNode, CircuitScores


def node(kind, layer, index, token, influence, contribution, label=None):
    return CircuitNode(
        kind=kind,
        layer=layer,
        index=index,
        token=token,
        influence=influence,
        contribution=contribution,
        activation=1.0,
        followed=True,
        label=label,
    )


@pytest.fixture
def answer():
    nodes = [
        node("feature", 2, 5, 0, 0.4, 1.0, "fur"),
        node("feature", 2, 5, 3, 0.1, -0.25, "fur"),
        node("embedding", None, None, 1, 0.3, 0.0),
        node("embedding", None, None, 2, 0.25, 0.5),
        node("error", 1, None, 2, 0.05, 0.0),
    ]
    edges = [(0, None, 1.0), (2, 0, 2.0), (3, 0, -0.5), (3, 1, 0.25), (4, 1, -3.0)]
    scores = CircuitScores(embeddings=0.5, errors=0.1, left_out=0.4, constant=0, replacement=0.83, completeness=0.9)
    return SimpleNamespace(
        target="cat",
        contrast="dog",
        logit=3.5,
        nodes=nodes,
        edges=[CircuitEdge(source=source, target=target, weight=weight) for source, target, weight in edges],
        scores=scores,
        followed=2,
        active=700,
        warnings=[],
    )


def test_nodes_are_summed_over_tokens(answer):
    groups = grouped(answer)
    assert [(name, group.tokens) for name, group in groups.items()] == [
        (("embedding", -1, -1), 2),
        (("feature", 2, 5), 2),
        (("error", 1, -1), 1),
    ]
    fur = groups["feature", 2, 5]
    assert (fur.influence, fur.contribution, fur.label) == pytest.approx((0.5, 0.75, "fur"))
    assert dict(fur.fed_by) == pytest.approx({("embedding", -1, -1): 1.75, ("error", 1, -1): -3.0})


def test_what_is_printed(answer):
    console = Console(file=io.StringIO(), width=110)
    print_circuit(answer, 2, console)
    text = console.file.getvalue()
    assert "What made cat rather than dog (logit 3.50)" in text
    assert "2/5 fur" in text
    assert "error 1 -3.00  embeddings +1.75" in text
    assert "5 nodes, 5 edges; 2 of 700 active features" in text
    assert "errors (10%)" in text
    assert "not followed (40%)" in text
    assert text.count("error 1") == 1, "two groups alone were asked for"
