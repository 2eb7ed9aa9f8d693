"""trace.onnx and sources.onnx in a bundle: shared tensors, any number of directions, and a check that notices."""

import shutil
from copy import deepcopy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from vitrine.models.account.sources import Baseline, Trace, about, accounts
from vitrine.models.bundle.layout import BASELINE, SOURCES_OUTPUTS, STARTS, TRACE_OUTPUTS
from vitrine.models.bundle.sealing import seal
from vitrine.models.export.parity import check_scores, check_sources
from vitrine.models.export.sources import export_scores, write_sources
from vitrine.models.graph.onnx_file import ExportError
from vitrine.models.graph.scores import ScoresGraph
from vitrine.models.graph.sources import SourcesGraph
from vitrine.models.graph.trace import TraceGraph


def run(bundle, pixels, directions):
    """(trace, outputs of sources.onnx) of one image and label directions [n, D]."""
    tracing, following = (
        onnxruntime.InferenceSession(bundle.path / file, providers=["CPUExecutionProvider"])
        for file in ("trace.onnx", "sources.onnx")
    )
    outputs = dict(zip(TRACE_OUTPUTS, tracing.run(list(TRACE_OUTPUTS), {"pixels": pixels}), strict=True))
    trace = Trace.from_batch(outputs, 0)
    start = trace.starts(directions, bundle.fold, bundle.manifest.logit_scale)
    count, layers = len(start), bundle.manifest.shape.layers
    at = (start.astype(np.float32), np.full(count, layers), np.zeros(count, np.int64), np.zeros(count, np.int64))
    feeds = dict(zip(STARTS, at, strict=True)) | {name: outputs[name][0] for name in TRACE_OUTPUTS[3:]}
    return trace, dict(zip(SOURCES_OUTPUTS, following.run(list(SOURCES_OUTPUTS), feeds), strict=True))


@pytest.mark.parametrize("count", [1, 3])
def test_accounts_of_any_number_of_directions_add_up(bundle, count, make_pixels):
    directions = np.random.default_rng(0).normal(size=(count, bundle.manifest.shape.embedding)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    trace, outputs = run(bundle, make_pixels(1, seed=12).numpy(), directions)
    baseline = Baseline(*bundle.baseline)
    for n, sources in enumerate(accounts(trace, outputs, directions, bundle.beta, bundle.manifest.logit_scale)):
        assert abs(sources.remainder) < 1e-3
        assert sources.features.any()
        assert abs(about(sources, trace, outputs["gradients"][n], baseline).remainder) < 1e-3


def test_what_other_graphs_have_is_stored_once(bundle):
    """The tower's weights are vision.onnx's, the decoders replacement.onnx's. In so small a bundle vision.onnx has no
    table of all encoder rows, which is stored anew."""
    sizes = {name: entry.bytes for name, entry in bundle.manifest.files.items()}
    assert "trace.onnx.data" not in sizes
    assert sizes["sources.onnx.data"] <= 3 * 64 * 32 * 4
    model = onnx.load(bundle.path / "sources.onnx", load_external_data=False)
    places = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data}
    assert {"vision.onnx.data", "replacement.onnx.data"} <= places
    assert "scores.onnx.data" not in sizes


@pytest.mark.usefixtures("remembered_conversions")
def test_without_a_clt_the_mlps_outputs_take_the_features_place(clip, bundle, make_pixels, tmp_path):
    """By layer and token; all else as ever."""
    write_sources(tmp_path, clip, None, torch.float32, [])
    tracing, following = (
        onnxruntime.InferenceSession(tmp_path / file, providers=["CPUExecutionProvider"])
        for file in ("trace.onnx", "sources.onnx")
    )
    names = TRACE_OUTPUTS[:-2]
    assert [node.name for node in tracing.get_outputs()] == list(names)
    outputs = dict(zip(names, tracing.run(list(names), {"pixels": make_pixels(1, seed=12).numpy()}), strict=True))
    trace = Trace.from_batch(outputs, 0)
    directions = np.eye(24, dtype=np.float32)[:2]
    start = trace.starts(directions, bundle.fold, bundle.manifest.logit_scale).astype(np.float32)
    feeds = {"direction": start, "layer": np.full(2, 3)} | dict.fromkeys(("token", "feature"), np.zeros(2, np.int64))
    feeds |= {name: outputs[name][0] for name in names[3:]}
    taken = {node.name for node in following.get_inputs()}
    feeds = {name: feed for name, feed in feeds.items() if name in taken}
    found = dict(zip(SOURCES_OUTPUTS[:3], following.run(list(SOURCES_OUTPUTS[:3]), feeds), strict=True))
    for sources in accounts(trace, found, directions, bundle.beta, bundle.manifest.logit_scale):
        assert abs(sources.remainder) < 1e-3
        assert np.abs(sources.errors).sum() > 1  # what the MLPs wrote
        assert not sources.by_feature()[0].size


@pytest.mark.usefixtures("remembered_conversions")
def test_without_images_there_is_no_average_picture(bundle, clip, make_clt, tmp_path):
    """Of per-layer transcoders, written before the other graphs of a bundle."""
    of_sources = {"trace.onnx", "sources.onnx", "sources.onnx.data", "scores.onnx", *BASELINE}
    write_sources(tmp_path, clip, make_clt(clip, seed=2, cross_layer=False), torch.float32, [])
    for name in bundle.manifest.files.keys() - of_sources:
        shutil.copyfile(bundle.path / name, tmp_path / name)
    built = seal(tmp_path, bundle.manifest)
    assert built.has_sources
    assert built.baseline is None
    directions = np.eye(24, dtype=np.float32)[:2]
    trace, outputs = run(built, np.zeros((1, 3, 32, 32), np.float32), directions)
    for sources in accounts(trace, outputs, directions, built.beta, built.manifest.logit_scale):
        assert abs(sources.remainder) < 1e-3


@pytest.mark.parametrize("part", ["trace", "sources"])
def test_the_check_notices_other_weights(bundle, clip, clt, part):
    clt = deepcopy(clt)
    trace, sources = TraceGraph(clip.tower, clt, torch.float32), SourcesGraph(clip.tower, clt, torch.float32)
    check_sources(clip, trace, sources, bundle.path)
    with torch.no_grad():
        if part == "trace":
            trace.encoders[1].weight.mul_(-1)
        else:
            sources.decoder_biases[1] += 0.1
    with pytest.raises(ExportError, match=rf"{part}\.onnx"):
        check_sources(clip, trace, sources, bundle.path)


def test_the_check_notices_other_scores(bundle, clip):
    scores = ScoresGraph(clip.tower)
    check_scores(clip, scores, bundle.path)
    with torch.no_grad():
        scores.attention[1].query_key_value.bias[0] += 0.1
    with pytest.raises(ExportError, match=r"queries of scores\.onnx"):
        check_scores(clip, scores, bundle.path)


def test_the_check_compares_scores_with_the_traces_weights(bundle, clip, tmp_path):
    """Torch and the file agree, but not with the network."""
    for name in bundle.manifest.files:
        if name.endswith((".onnx", ".data", ".npy")) and "/" not in name:
            shutil.copyfile(bundle.path / name, tmp_path / name)
    tower = deepcopy(clip.tower)
    with torch.no_grad():
        tower.blocks[2].attn.in_proj_bias[:32] += 0.5
    with pytest.raises(ExportError, match=r"weights by scores\.onnx"):
        check_scores(clip, export_scores(tmp_path, tower), tmp_path)
