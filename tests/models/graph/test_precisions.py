"""Faster variants of the vision graph: what they change, how exactly they add up, and the gate they must pass."""

import copy
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.layout import ALWAYS, DETAILS_INPUT, EVERY_OUTPUT, ON_REQUEST, VISION_OUTPUTS
from vitrine.models.bundle.manifest import Agreement
from vitrine.models.bundle.sealing import seal
from vitrine.models.export import export
from vitrine.models.export.export import export_bundle
from vitrine.models.graph.onnx_file import ExportError, to_onnx
from vitrine.models.graph.variants import make_variant, preselect
from vitrine.models.precision.agreement import measure


@pytest.fixture(scope="module")
def model(graph, conversions):
    with conversions.remembered():
        return to_onnx(graph, {"pixels": torch.zeros(2, 3, 32, 32)}, ALWAYS, ON_REQUEST, DETAILS_INPUT)


@pytest.fixture(scope="module", params=["int8", "fp16"])
def variant(request, model):
    return request.param, make_variant(model, request.param)


def run(model, pixels, details=False):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = EVERY_OUTPUT if details else VISION_OUTPUTS
    return dict(zip(names, session.run(names, {"pixels": pixels, DETAILS_INPUT: np.array(details)}), strict=True))


def test_every_product_with_a_weight_is_touched_but_those_to_the_embeddings_space(variant, model):
    name, changed = variant
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    # 3 encoders; in 3 layers attention's output and the MLP's two; queries, keys and values: one, and two in the last
    # layer; and not touched: three to the embedding's space, of the embedding, the rows and the MLPs' rows
    assert len(products) == 3 + 3 * 3 + 2 + 2 + 3
    if name == "int8":
        assert sum(node.op_type == "MatMulInteger" for node in changed.graph.node) == len(products) - 3
        assert len([tensor for tensor in changed.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]) >= 16
    else:
        halves = {t.name for t in changed.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
        touched = [node for node in changed.graph.node if node.op_type == "MatMul" and node.input[1] in halves]
        assert len(touched) == len(products) - 3
    assert not any(node.op_type == "MatMulInteger" for node in model.graph.node)


class Twice(torch.nn.Module):
    """Two outputs by one weight; 96 x 96 is more than the exporter turns by itself."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(96, 96)

    def forward(self, pixels):
        return self.linear(pixels), self.linear(pixels.relu())


def test_a_large_weight_that_two_products_read_is_found():
    """Attention's output in the vision graph: its heads' parts, on request, read the same weight."""
    module, pixels = Twice().eval(), torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0))
    model = to_onnx(module, {"pixels": pixels}, ("always",), ("asked",), DETAILS_INPUT)
    assert not any(node.op_type == "Transpose" for node in model.graph.node)
    changed = make_variant(model, "int8")
    assert sum(node.op_type == "MatMulInteger" for node in changed.graph.node) == 1
    for exported, tolerance in ((model, 1e-6), (changed, 0.05)):
        session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs = session.run(["always", "asked"], {"pixels": pixels.numpy(), DETAILS_INPUT: np.array(True)})
        for output, expected in zip(outputs, module(pixels), strict=True):
            np.testing.assert_allclose(output, expected.detach().numpy(), rtol=0, atol=tolerance)


def test_rows_of_a_variant_add_up_just_as_exactly(variant, model, make_pixels):
    pixels = make_pixels(3, seed=4).numpy()
    outputs, expected = run(variant[1], pixels, details=True), run(model, pixels)
    np.testing.assert_allclose(outputs["rows"].sum(1), outputs["embedding"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(outputs["lens"][:, -1], outputs["embedding"], rtol=0, atol=1e-5)
    difference = np.abs(outputs["rows"] - expected["rows"]).max()
    assert 1e-6 < difference < (0.2 if variant[0] == "int8" else 0.02)  # a different graph, but only slightly


def test_candidates_are_found_by_bytes_and_looked_at_exactly(model, make_pixels):
    changed = preselect(copy.deepcopy(model))
    assert sum(node.op_type == "MatMulInteger" for node in changed.graph.node) == 3
    names = {tensor.name for tensor in changed.graph.initializer}
    replaced = [tensor.name for tensor in model.graph.initializer if tensor.name not in names]
    assert len(replaced) == 3  # only their bytes remain
    assert {f"{name}.bytes" for name in replaced} < names
    pixels = make_pixels(5, seed=4).numpy()
    outputs, expected = run(changed, pixels), run(model, pixels)
    for name in VISION_OUTPUTS:
        np.testing.assert_allclose(outputs[name], expected[name], rtol=0, atol=2e-5, err_msg=name)


def test_nothing_to_encode_is_no_division_by_zero(model):
    """LayerNorms without weight and bias: the encoders read zeros."""
    changed = preselect(copy.deepcopy(model))
    for tensor in changed.graph.initializer:
        if ".ln_2." in tensor.name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
    outputs = run(changed, np.zeros((2, 3, 32, 32), np.float32))
    assert all(np.isfinite(outputs[name]).all() for name in VISION_OUTPUTS)


def test_agreement_is_what_it_says(bundle, model, variant, clip, make_pixels, tmp_path):
    onnx.save(variant[1], tmp_path / "variant.onnx")
    sessions = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in (bundle.path / "vision.onnx", tmp_path / "variant.onnx")
    ]
    labels = clip.encode_labels(["red circle", "green square", "blue triangle"], ["{}"]).numpy()
    pixels = [make_pixels(count, seed=count).numpy() for count in (1, 4, 3)]
    directions, fold = np.load(bundle.path / "directions.npy"), np.load(bundle.path / "fold.npy")[:-1]
    agreement = measure(*sessions, pixels, labels, directions, fold)
    top1, cosine, overlap = [], [], []
    for batch in pixels:
        one, other = run(model, batch), run(variant[1], batch)
        for image in range(len(batch)):
            label = (labels @ one["embedding"][image]).argmax()
            top1.append(label == (labels @ other["embedding"][image]).argmax())
            a, b = (rows["rows"][image] @ labels[label] for rows in (one, other))
            cosine.append(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))
            largest = []
            for outputs in (one, other):
                contributions = {}
                for layer in range(3):
                    code = (outputs[f"feature_{part}"][image, layer] for part in ("indices", "values"))
                    for feature, value in zip(*code, strict=True):
                        contributions[layer, feature] = abs(value * directions[layer, feature] @ fold @ labels[label])
                largest.append(set(sorted(contributions, key=contributions.get)[-10:]))
            overlap.append(len(largest[0] & largest[1]) / 10)
    assert agreement.images == 8
    assert agreement.top1 == np.mean(top1)
    assert agreement.ledger_cosine == pytest.approx(np.mean(cosine), abs=1e-5)
    assert agreement.top_features == pytest.approx(np.mean(overlap))
    assert agreement.ledger_cosine < 1


@pytest.mark.parametrize(
    ("top1", "cosine", "features", "enough"),
    [
        (0.99, 0.99, 0.9, True),
        (1, 1, 1, True),
        (0.989, 1, 1, False),
        (1, 0.989, 1, False),
        (1, 1, 0.899, False),
        (1, math.nan, 1, False),
    ],
)
def test_gate(top1, cosine, features, enough):
    assert Agreement(images=9, top1=top1, ledger_cosine=cosine, top_features=features).is_sufficient == enough


@pytest.fixture(scope="module")
def gated(clip, clt, cls_mean, provenance, make_pixels, conversions, tmp_path_factory):
    """(a bundle whose fp16 passed its gate and whose int8 did not, the messages about it)."""
    messages, results = [], [(0.5, 0.25, 0.125), (1, 1, 1)]  # of int8 and of fp16

    def fake_measure(*_, done):
        top1, cosine, features = results.pop(0)
        return Agreement(images=2, top1=top1, ledger_cosine=cosine, top_features=features)

    with pytest.MonkeyPatch.context() as patch, conversions.remembered():
        patch.setattr(export, "measure", fake_measure)
        out = tmp_path_factory.mktemp("gated") / "bundle"
        arguments = {"variants": ("int8", "fp16"), "calibration": [make_pixels(2)], "log": messages.append}
        return export_bundle(clip, clt, cls_mean, provenance, out, **arguments), messages


def test_variant_that_fails_its_gate_is_not_written(gated):
    bundle, messages = gated
    assert bundle.manifest.precisions == ("fp32", "fp16")
    assert bundle.manifest.agreement == {"fp16": Agreement(images=2, top1=1, ledger_cosine=1, top_features=1)}
    assert {file.name for file in bundle.path.glob("vision*")} == {
        "vision.onnx", "vision.onnx.data", "vision.fp16.onnx", "vision.fp16.onnx.data"
    }  # fmt: skip
    (message,) = messages
    assert message.startswith(
        "int8 is left out: it does not agree with float32: on 2 images top-1 50.0% (at least 99%),"
    )


def test_manifest_that_promises_a_variant_must_have_it(gated):
    bundle, _ = gated
    (bundle.path / "vision.fp16.onnx").unlink()
    with pytest.raises(BundleError, match=r"does not list vision\.fp16\.onnx$"):
        seal(bundle.path, bundle.manifest)
    with pytest.raises(BundleError, match=r"does not list vision\.fp16\.onnx$"):
        open_bundle(bundle.path)


def test_variant_without_images_to_check_it_on_is_refused(clip, clt, cls_mean, provenance, tmp_path):
    with pytest.raises(ExportError, match="fp16 must be checked against float32, but there are no images; give some"):
        export_bundle(clip, clt, cls_mean, provenance, tmp_path / "out", variants=("fp16",))
    assert not (tmp_path / "out").exists()
