"""Circuits summed over tokens and averaged over images, by hand, and printed."""

import io

import pytest
from rich.console import Console

from vitrine.service.answers.circuit_groups import MeanCircuit, grouped
from vitrine.service.exports.circuit_summary import print_circuit
from vitrine.service.schemas.base import Model, Notice
from vitrine.service.schemas.circuit import (
    CircuitEdge,
    CircuitInflow,
    CircuitNode,
    CircuitResponse,
    CircuitScores,
)


def inflow(unfollowed):
    return CircuitInflow(unfollowed=0.5, unfollowed_share=unfollowed, pruned=0, pruned_share=0, constant=0)


def node(kind, layer, index, token, influence, contribution, label=None, unfollowed=None):
    return CircuitNode(
        kind=kind,
        layer=layer,
        index=index,
        token=token,
        influence=influence,
        contribution=contribution,
        activation=1.0 if kind == "feature" else None,
        followed=unfollowed is not None,
        inflow=None if unfollowed is None else inflow(unfollowed),
        label=label,
    )


def answer_of(nodes, edges, **fields):
    defaults = {
        "request_id": "test",
        "model": Model(name="tiny", digest="sha256:00"),
        "warnings": [],
        "predictions": [],
        "target": "cat",
        "contrast": "dog",
        "logit": 3.5,
        "inflow": inflow(0.2),
        "scores": CircuitScores(
            embeddings=0.5, errors=0.1, left_out=0.4, constant=0, replacement=0.83, completeness=0.9
        ),
        "followed": 2,
        "active": 700,
        "kept": 2,
        "kept_share": 2 / 700,
        "dictionary": "clt",
        "layers": 3,
        "rows": 2,
        "columns": 2,
        "timings_ms": {},
    }
    edges = [CircuitEdge(source=source, target=target, weight=weight) for source, target, weight in edges]
    return CircuitResponse(nodes=nodes, edges=edges, **defaults | fields)


@pytest.fixture
def answer():
    nodes = [
        node("feature", 2, 5, 0, 0.4, 1.0, "fur", 0.25),
        node("feature", 2, 5, 3, 0.1, -0.25, "fur", 0.75),
        node("embedding", None, None, 1, 0.3, 0.0),
        node("embedding", None, None, 2, 0.25, 0.5),
        node("error", 1, None, 2, 0.05, 0.0),
    ]
    return answer_of(nodes, [(0, None, 1.0), (2, 0, 2.0), (3, 0, -0.5), (3, 1, 0.25), (4, 1, -3.0)])


def by_name(circuit):
    return {(group.kind, group.layer, group.index): group for group in circuit.groups}


def edges(circuit):
    names = [(group.kind, group.layer, group.index) for group in circuit.groups]
    end = [*names, None]
    return {
        (names[edge.source], end[-1 if edge.target is None else edge.target]): (edge.weight, edge.images)
        for edge in circuit.edges
    }


FUR, INPUT, ERROR = ("feature", 2, 5), ("embedding", None, None), ("error", 1, None)


def test_nodes_are_summed_over_tokens(answer):
    circuit = grouped(answer)
    groups = by_name(circuit)
    assert [(name, group.tokens, group.images) for name, group in groups.items()] == [
        (INPUT, 2, 1),
        (FUR, 2, 1),
        (ERROR, 1, 1),
    ]
    fur = groups[FUR]
    assert (fur.influence, fur.contribution, fur.label) == pytest.approx((0.5, 0.75, "fur"))
    assert fur.unfollowed_share == pytest.approx((0.4 * 0.25 + 0.1 * 0.75) / 0.5)
    assert groups[ERROR].unfollowed_share is None
    assert [(one.token, one.influence, one.activation) for one in fur.where] == [(0, 0.4, 1.0), (3, 0.1, 1.0)]
    assert edges(circuit) == {(FUR, None): (1.0, 1), (INPUT, FUR): (1.75, 1), (ERROR, FUR): (-3.0, 1)}
    assert (circuit.images, circuit.targets, circuit.nodes) == (1, {"cat": 1}, 5)


def test_what_is_printed(answer):
    console = Console(file=io.StringIO(), width=120)
    print_circuit(grouped(answer).model_copy(update={"unreadable": ["a: b", "c: d"], "failed": {"x": 2}}), 2, console)
    text = console.file.getvalue()
    assert "What made cat rather than dog (logit 3.50)" in text
    assert "2/5 fur" in text
    assert "error 1 -3.00  embeddings +1.75" in text
    assert "35%" in text, "a quarter of .4 and three quarters of .1, of .5"
    assert "5 nodes. Of 700 active features, 2 were followed back and 2 (0.3%) are in the circuit" in text
    assert "errors (10%)" in text
    assert "not followed (40%)" in text
    assert text.count("error 1") == 1, "two groups alone were asked for"
    assert "left out: 2 x (a: b; c: d)" in text


@pytest.fixture
def mean(answer):
    """Of that circuit and one without the error, with another feature and another target."""
    nodes = [
        node("feature", 2, 5, 1, 0.2, 0.5, "fur", 0.75),
        node("embedding", None, None, 0, 0.15, 0.0),
        node("feature", 0, 7, 1, 0.1, 0.0, None, 0.0),
    ]
    notice = Notice(code="image_transparent", message="it was", labels=[])
    links = [(0, None, 0.5), (2, 0, 4.0), (1, 2, 1.0)]
    other = answer_of(nodes, links, target="dog", logit=1.5, active=100, kept=2, kept_share=0.02, warnings=[notice])
    total = MeanCircuit()
    for one in (answer, other):
        total.add(grouped(one))
    assert total.images == 2
    return total.mean()


def test_means_are_over_all_images_and_presence_is_counted(mean):
    groups = by_name(mean)
    assert [group.influence for group in mean.groups] == sorted((g.influence for g in mean.groups), reverse=True)
    fur = groups[FUR]
    assert (fur.images, fur.tokens) == (2, 1.5)
    assert (fur.influence, fur.contribution) == pytest.approx(((0.5 + 0.2) / 2, (0.75 + 0.5) / 2))
    assert fur.unfollowed_share == pytest.approx((0.5 * 0.35 + 0.2 * 0.75) / 0.7)
    error = groups[ERROR]
    assert (error.images, error.tokens, error.influence) == pytest.approx((1, 1, 0.025))
    assert not fur.where
    assert edges(mean) == {
        (FUR, None): (0.75, 2),
        (INPUT, FUR): (0.875, 1),
        (ERROR, FUR): (-1.5, 1),
        (("feature", 0, 7), FUR): (2.0, 1),
        (INPUT, ("feature", 0, 7)): (0.5, 1),
    }
    assert (mean.images, mean.logit, mean.active, mean.nodes) == pytest.approx((2, 2.5, 400, 4))
    assert mean.kept_share == pytest.approx((2 / 700 + 0.02) / 2)
    assert mean.scores.left_out == pytest.approx(0.4)
    assert mean.targets == {"cat": 1, "dog": 1}
    assert [notice.code for notice in mean.warnings] == ["image_transparent"]


def test_a_mean_is_printed_with_the_images_that_have_it(mean):
    console = Console(file=io.StringIO(), width=140)
    print_circuit(mean, 20, console)
    text = console.file.getvalue()
    assert "What made the top-1 (cat 1, dog 1) rather than dog in 2 images (mean logit 2.50)" in text
    row = next(line for line in text.splitlines() if "2/5 fur" in line)
    assert row.split()[2:6] == ["2", "1.5", "35.0%", "+0.625"]
    assert "0/7 +2.00" in row
    assert "Mean per image: 4 nodes. Of 400 active features, 2 were" in text
    assert "warning: it was" in text
