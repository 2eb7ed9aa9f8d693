"""Residual SAEs in a bundle: tensors stored once, old bundles as they were, and a check that notices."""

import shutil
from copy import deepcopy
from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch

from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.layout import RESIDUAL, RESIDUAL_RERUN, RESIDUAL_TRACE, residual_file
from vitrine.models.bundle.sealing import seal
from vitrine.models.export.residual import add_residual, rounded
from vitrine.models.export.residual_parity import check_residual
from vitrine.models.graph.gated_trace import GatedTraceGraph
from vitrine.models.graph.onnx_file import ExportError, save_onnx
from vitrine.models.graph.residual import FeatureSourcesGraph, LogitSourcesGraph


def test_the_bundle_is_the_other_one_with_more(bundle, with_residual, residual_export):
    manifest, older = with_residual.manifest, bundle.manifest
    assert not bundle.has_residual
    assert with_residual.has_residual
    summary = manifest.residual
    assert (summary.features, summary.k, summary.k_cls) == ((48, 64), (8, 9), (5, 6))
    assert summary.recipe == residual_export.recipe
    added = manifest.files.keys() - older.files.keys()
    assert {RESIDUAL_TRACE, *map(residual_file, range(3))} <= added
    assert all(name.startswith(RESIDUAL) for name in added)
    assert summary.bytes == sum(manifest.files[name].bytes for name in added)
    changed = {name for name in older.files if older.files[name] != manifest.files[name]}
    assert changed == {"MODEL_CARD.md"}
    card = (with_residual.path / "MODEL_CARD.md").read_text()
    assert "## Residual SAEs" in card
    assert "48, 64 (by layer)" in card
    assert "| variance explained, mean of layers | 0.8750 |" in card


def test_what_other_graphs_have_is_stored_once(with_residual):
    """The tower's weights, as they are or transposed, are vision.onnx's; an SAE's rows are in files of their own."""
    sizes = {name: entry.bytes for name, entry in with_residual.manifest.files.items()}
    for name in (RESIDUAL_TRACE, RESIDUAL_RERUN, residual_file(1), residual_file(2)):
        assert sizes.get(f"{name}.data", 0) < 4 * 32 * 48, name
    model = onnx.load(with_residual.path / residual_file(1), load_external_data=False)
    places = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data}
    assert {"vision.onnx.data", "residual_encoder_1.npy", "residual_decoder_0.npy"} <= places


def test_a_transposed_tensor_is_read_from_the_other_model(tmp_path):
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).numpy()
    for name, tensor, size in (("one", weight, 16), ("other", weight.T, 24)):
        model = onnx.helper.make_model(
            onnx.helper.make_graph(
                [onnx.helper.make_node("MatMul", ["w", "x"], ["y"])],
                name,
                [onnx.helper.make_tensor_value_info("x", 1, [size, 1])],
                [onnx.helper.make_tensor_value_info("y", 1, [40 - size, 1])],
                [onnx.numpy_helper.from_array(tensor, "w")],
            ),
            opset_imports=[onnx.helper.make_opsetid("", 20)],
            ir_version=9,
        )
        save_onnx(model, tmp_path / f"{name}.onnx", [tmp_path / "one.onnx"] if name == "other" else [])
    assert not (tmp_path / "other.onnx.data").exists()
    x = torch.randn(24, 1, generator=torch.Generator().manual_seed(1)).numpy()
    (found,) = onnxruntime.InferenceSession(tmp_path / "other.onnx").run(["y"], {"x": x})
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(weight.T @ x))


def test_a_bundle_lacks_nothing_that_its_manifest_names(with_residual, tmp_path):
    for change, said in (
        ({"features": (48,)}, "residual.features has 1 numbers, but 3 layers have 2 SAEs"),
        ({}, f"does not list {residual_file(1)}"),
    ):
        copy = shutil.copytree(with_residual.path, tmp_path / "copy")
        (copy / residual_file(1)).unlink()
        manifest = with_residual.manifest
        summary = manifest.residual.model_copy(update=change)
        with pytest.raises(BundleError, match=said):
            seal(copy, manifest.model_copy(update={"residual": summary}))
        shutil.rmtree(copy)


def test_what_cannot_be_added_is_refused(bundle, clip, make_clip, make_saes, residual_export, tmp_path):
    with pytest.raises(ExportError, match="a bundle is never changed"):
        add_residual(bundle, clip, residual_export, bundle.path)
    with pytest.raises(ExportError, match="a CLIP with other weights"):
        add_residual(bundle, replace(clip, sha256="0" * 64), residual_export, tmp_path / "new")
    deeper = replace(residual_export, saes=make_saes(make_clip(vision_cfg={"layers": 4})))
    with pytest.raises(ExportError, match="3 residual SAEs of width 32 do not fit a CLIP of 3 layers and width 32"):
        add_residual(bundle, clip, deeper, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_tables_in_float16_are_exact_there(residual_export):
    saes = rounded(residual_export.saes, torch.float16)
    for ours, theirs in zip(saes.decoders, residual_export.saes.decoders, strict=True):
        assert torch.equal(ours.weight, theirs.weight.half().float())
        assert not torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("part", ["trace", "block_0", "block_2"])
def test_the_check_notices_other_weights(with_residual, clip, residual_export, part):
    saes = deepcopy(residual_export.saes)
    trace = GatedTraceGraph(clip.tower, saes)
    blocks = [FeatureSourcesGraph(clip.tower, saes, block) for block in range(2)]
    blocks.append(LogitSourcesGraph(clip.tower, saes))
    with torch.no_grad():
        if part == "trace":
            trace.encoders[1].weight.mul_(-1)
        elif part == "block_0":
            blocks[0].biases = blocks[0].biases + 0.1
        else:
            blocks[2].below.bias = 2 * blocks[2].below.bias
    with pytest.raises(ExportError, match=rf"{part}\.onnx"):
        check_residual(clip, saes, trace, blocks, with_residual.path)


def test_an_older_bundle_opens_as_it_did(bundle):
    assert open_bundle(bundle.path).manifest.residual is None
