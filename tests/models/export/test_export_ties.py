"""The parity check distinguishes ties, which two runtimes may order differently, from wrong features."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitrine.models.bundle.layout import VISION_OUTPUTS
from vitrine.models.export import parity
from vitrine.models.export.parity import _check_code, check_vision
from vitrine.models.graph.onnx_file import ExportError


def outputs(*codes):
    """The outputs that `_check_code` reads, for one image with one layer per code {feature: activation}."""
    indices, values = (np.array([[list(part) for part in parts]]) for parts in (codes, [c.values() for c in codes]))
    return {"feature_indices": indices, "feature_values": values}


def graph_of(places, threshold=None):
    layers = len(places)
    table = None if threshold is None else torch.full((layers, 9), threshold)
    return SimpleNamespace(layers=layers, places=places, threshold=table)


@pytest.mark.parametrize(
    ("places", "threshold", "code", "other", "same"),
    [
        ((2,), None, {1: 5.0, 2: 3.0}, {2: 3.0, 1: 5.0}, True),
        ((2,), None, {1: 5.0, 2: 3.0}, {1: 5.0, 3: 3.0001}, False),  # ties for the last place
        ((2,), None, {1: 5.0, 2: 0.0}, {1: 5.0, 3: 0.0001}, False),  # ties with zero
        ((1,), None, {1: 5.0, 2: 0.0}, {3: 5.0, 2: 0.0}, False),  # a narrower layer: its edge is not 0
        ((2,), None, {1: 5.0, 2: -3.0}, {1: 5.0, 3: 3.0001}, False),  # by magnitude
        ((2,), 4.0, {1: 5.0, 2: 0.0}, {1: 5.0, 3: 4.0001}, False),  # ties with its threshold
        ((2,), 1.0, {1: 5.0, 2: 3.0}, {1: 5.0, 3: 3.0001}, False),  # all places in use: ties for the last
    ],
)
def test_ties_are_distinguished_from_mistakes(places, threshold, code, other, same):
    graph = graph_of(places, threshold)
    for actual, expected in ((code, other), (other, code)):
        assert _check_code(outputs(actual), outputs(expected), graph).tolist() == [same]


@pytest.mark.parametrize(
    ("places", "threshold", "code", "other"),
    [
        ((2,), None, {1: 5.0, 2: 3.0}, {1: 5.1, 2: 3.0}),
        ((2,), None, {1: 5.0, 2: 3.0}, {1: -5.0, 2: 3.0}),
        ((2,), None, {1: 5.0, 2: 3.0}, {1: 5.0, 3: 3.1}),
        ((2,), None, {1: 5.0, 2: 3.0}, {1: 5.0, 3: 0.0}),  # one is missing
        ((1,), None, {1: 5.0, 2: 0.0}, {1: 5.0, 2: 0.1}),  # a place outside its layer's
        ((2,), 4.0, {1: 5.0, 2: 0.0}, {1: 5.0, 3: 4.1}),
        ((2,), 4.0, {1: 5.0, 2: 0.0}, {1: 5.0, 3: 0.1}),  # below the threshold
        ((2,), None, {1: 5.0, 2: 3.0}, {1: np.nan, 2: 3.0}),
    ],
)
def test_mistakes_are_distinguished_from_ties(places, threshold, code, other):
    graph = graph_of(places, threshold)
    for actual, expected in ((code, other), (other, code)):
        with pytest.raises(ExportError, match="activation differs"):
            _check_code(outputs(actual), outputs(expected), graph)


def test_image_with_a_tie_is_left_out_of_what_is_made_of_features(clip, graph, bundle, monkeypatch):
    """The other feature of a tie writes another row. If all images had ties, nothing could be compared."""
    other = deepcopy(graph)
    other.directions[:] = 0
    path = bundle.path / "vision.onnx"
    monkeypatch.setattr(parity, "_check_code", lambda actual, expected, graph: np.zeros(len(actual["norm"]), bool))
    with pytest.raises(ExportError, match=r"^the check could not compare anything: in every image two features tie"):
        check_vision(clip, other, path)
    monkeypatch.setattr(parity, "_check_code", lambda actual, expected, graph: np.arange(len(actual["norm"])) == 3)
    check_vision(clip, graph, path)
    with pytest.raises(ExportError, match=r"^rows at batch 5"):
        check_vision(clip, other, path)

    forward = graph.forward

    def with_another_row_for_the_first_image(pixels):
        outputs = [output.clone() for output in forward(pixels)]
        outputs[VISION_OUTPUTS.index("rows")][0] += 1
        return outputs

    monkeypatch.setattr(parity, "_check_code", lambda actual, expected, graph: np.arange(len(actual["norm"])) != 0)
    monkeypatch.setattr(graph, "forward", with_another_row_for_the_first_image)
    check_vision(clip, graph, path)
