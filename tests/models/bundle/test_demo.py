"""The embedded bundle is not older than what today's exporter writes: its answers lack nothing."""

import onnx
import pytest

from common import ROOT
from vitrine.models.bundle.layout import (
    ALWAYS,
    EVERY_OUTPUT,
    REPLACEMENT_OUTPUTS,
    RERUN,
    RESIDUAL_RERUN,
    RESIDUAL_TRACE,
    RESIDUAL_TRACE_OUTPUTS,
    SCORES_OUTPUTS,
    SOURCES_OUTPUTS,
    TRACE_OUTPUTS,
)

DEMO = ROOT / "models/demo"


@pytest.mark.parametrize(
    ("file", "outputs"),
    [
        ("vision.onnx", EVERY_OUTPUT),
        ("vision.int8.onnx", EVERY_OUTPUT),
        ("replacement.onnx", REPLACEMENT_OUTPUTS),
        ("trace.onnx", TRACE_OUTPUTS),
        ("sources.onnx", SOURCES_OUTPUTS),
        ("scores.onnx", SCORES_OUTPUTS),
        (RERUN, ALWAYS),
        (RESIDUAL_TRACE, RESIDUAL_TRACE_OUTPUTS),
        (RESIDUAL_RERUN, ALWAYS),
    ],
)
def test_every_graph_has_all_outputs(file, outputs):
    graph = onnx.load(DEMO / file, load_external_data=False).graph
    assert {output.name for output in graph.output} == set(outputs)


@pytest.mark.parametrize("file", [RERUN, RESIDUAL_RERUN])
def test_heads_are_changed_with_the_biases_of_their_values(file):
    """A factor of a head is also of its values' bias, which other graphs have merged into attention's output."""
    graph = onnx.load(DEMO / file, load_external_data=False).graph
    biases = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith(".value_biases")]
    assert len(biases) == 12
    assert all(bias.any() for bias in biases)
