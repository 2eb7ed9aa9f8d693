"""int8 leaves the products in float32 that it would spoil: those that read one value far larger than all others."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from vitrine.models.bundle.layout import ALWAYS, DETAILS_INPUT, ON_REQUEST
from vitrine.models.graph.onnx_file import to_onnx
from vitrine.models.graph.sensitive import LOSS, losses
from vitrine.models.graph.variants import _products, make_variant


@pytest.fixture(scope="module")
def model(graph, conversions):
    with conversions.remembered():
        return to_onnx(graph, {"pixels": torch.zeros(2, 3, 32, 32)}, ALWAYS, ON_REQUEST, DETAILS_INPUT)


@pytest.fixture(scope="module")
def images(make_pixels):
    return [make_pixels(3, seed=8).numpy(), make_pixels(2, seed=9).numpy()]


def spoiled(model):
    """The model whose second layer's MLP has one hidden channel 5,000 times as large, which it writes out as small."""
    changed = copy.deepcopy(model)
    weights = {tensor.name: tensor for tensor in changed.graph.initializer}
    (bias,) = (name for name in weights if name.endswith("blocks.1.mlp.c_fc.bias"))
    (add,) = (node for node in changed.graph.node if bias in node.input)
    (gelu,) = (node for node in changed.graph.node if add.output[0] in node.input)
    (product,) = (node for node in changed.graph.node if gelu.output[0] in node.input)
    shifted, out = numpy_helper.to_array(weights[bias]).copy(), numpy_helper.to_array(weights[product.input[1]]).copy()
    shifted[0] += 5_000
    out[0] /= 5_000
    weights[bias].CopyFrom(numpy_helper.from_array(shifted, bias))
    weights[product.input[1]].CopyFrom(numpy_helper.from_array(out, product.input[1]))
    return changed, product.output[0]


def products_in_float(model):
    """Outputs of the products that a graph computes in float32."""
    return {node.output[0] for node in model.graph.node if node.op_type == "MatMul"}


def test_a_product_with_one_value_far_larger_stays_in_float(model, images):
    changed, output = spoiled(model)
    products = _products(changed)
    found = losses(changed, products, images)
    assert {product.output[0] for product in products if found[product.name] > LOSS} == {output}
    kept = products_in_float(make_variant(changed, "int8", images))
    assert kept - products_in_float(make_variant(changed, "int8")) == {output}


def test_losses_are_what_onnxruntime_loses(model, images):
    """A product alone, quantised by the library: its relative error at the median token."""
    product = next(product for product in _products(model) if product.input[1] not in ("proj", "fold"))
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == product.input[1])
    asked = copy.deepcopy(model)
    asked.graph.output.append(helper.make_tensor_value_info(product.input[0], TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(asked.SerializeToString(), providers=["CPUExecutionProvider"])
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["bytes", "step", "zero"]),
        helper.make_node("DequantizeLinear", ["bytes", "step", "zero"], ["y"]),
    ]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, None)] for name in ("x", "y")]
    rounding = helper.make_model(
        helper.make_graph(nodes, "rounding", *ends), opset_imports=[helper.make_opsetid("", 20)]
    )
    rounding.ir_version = 10
    rounded = onnxruntime.InferenceSession(rounding.SerializeToString(), providers=["CPUExecutionProvider"])
    matrix = numpy_helper.to_array(weight)
    step = np.abs(matrix).max(0) / 127
    errors = []
    for pixels in (image[None] for batch in images for image in batch):
        (x,) = session.run([product.input[0]], {"pixels": pixels, DETAILS_INPUT: np.array(False)})
        exact = x @ matrix
        error = rounded.run(None, {"x": x})[0] @ (np.round(matrix / step) * step) - exact
        errors.append(np.linalg.norm(error, axis=-1) / np.linalg.norm(exact, axis=-1))
    found = losses(model, [product], images)
    assert found == {product.name: pytest.approx(float(np.median(np.concatenate(errors, axis=None))), rel=1e-3)}
    assert product.input[0] not in {output.name for output in model.graph.output}  # it is not changed
