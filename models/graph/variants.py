"""Faster variants of the vision graph, and the agreement check that each must pass before it is written.

    int8   products with a weight in 8 bits: weights quantised per output channel, activations at run time (ONNX
           Runtime's dynamic quantisation), except those that would lose too much (`models.graph.sensitive`). For CPUs
           with VNNI.
    fp16   the same products in half precision, everything between them in float32. For GPUs.

Unchanged are attention's own products, LayerNorms, the residual stream, the sparse decoding and, because the rows must
add up to the embedding, the last two products (ln_post's projection and the fold of the rows). So a variant's ledger
adds up just as exactly, but for a slightly different CLIP. The difference is measured on real images:
`models.precision.agreement`.
"""

from __future__ import annotations

import copy
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from vitrine.models.bundle.layout import Variant
from vitrine.models.graph.sensitive import LOSS, losses

EXACT = ("proj", "fold")  # weights of products that variants leave unchanged


def make_variant(
    model: onnx.ModelProto, variant: Variant, images: Sequence[NDArray[np.float32]] = ()
) -> onnx.ModelProto:
    """A variant of the float32 vision graph, which is not modified.

    images: batches of normalised pixels [B, 3, H, W]; on them int8 finds the products that it leaves in float32. None:
    it leaves none, which is for graphs with random weights.
    """
    model = copy.deepcopy(model)
    return _int8(model, images) if variant == "int8" else _fp16(model)


def preselect(model: onnx.ModelProto) -> onnx.ModelProto:
    """Quantise the encoders' products, which only select candidates, to 8 bits; modifies `model`.

    Weights in 8 bits with one scale per feature, [CLS] in 8 bits with one scale per image and layer. This reads a
    quarter of what float32 would, and these products are limited by memory reads. [CLS] is stored as unsigned bytes
    around 128, because CPUs have no fast product for signed ones. (CUDA has none for unsigned ones: there ONNX Runtime
    runs these on the CPU. The fp16 variant has no such products.)
    """
    graph = model.graph
    adds = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    encoders = {
        node.input[0] if node.input[1] == name else node.input[1]
        for name, node in adds.items()
        if re.fullmatch(r"(vision\.)?encoders\.\d+\.bias", name)
    }
    if not encoders:
        return model
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "MatMul" or node.output[0] not in encoders:
            nodes.append(node)
            continue
        x, name = node.input
        weight = numpy_helper.to_array(tensors[name])  # [d, F]
        scale = np.maximum(np.abs(weight).max(0), 1e-12) / 127
        graph.initializer.extend(
            [
                numpy_helper.from_array(np.round(weight / scale).astype(np.int8), f"{name}.bytes"),
                numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale"),
            ]
        )
        graph.initializer.remove(tensors.pop(name))
        prefix = f"{name}.x"
        nodes += [
            helper.make_node("Abs", [x], [f"{prefix}.abs"]),
            helper.make_node("ReduceMax", [f"{prefix}.abs", "preselect.last"], [f"{prefix}.max"], keepdims=1),
            helper.make_node("Max", [f"{prefix}.max", "preselect.least"], [f"{prefix}.some"]),
            helper.make_node("Mul", [f"{prefix}.some", "preselect.step"], [f"{prefix}.scale"]),
            helper.make_node("Div", [x, f"{prefix}.scale"], [f"{prefix}.steps"]),
            helper.make_node("Round", [f"{prefix}.steps"], [f"{prefix}.round"]),
            helper.make_node("Add", [f"{prefix}.round", "preselect.middle"], [f"{prefix}.about"]),
            helper.make_node("Cast", [f"{prefix}.about"], [f"{prefix}.bytes"], to=TensorProto.UINT8),
            helper.make_node(
                "MatMulInteger", [f"{prefix}.bytes", f"{name}.bytes", "preselect.zero"], [f"{prefix}.sums"]
            ),
            helper.make_node("Cast", [f"{prefix}.sums"], [f"{prefix}.float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{prefix}.float", f"{name}.scale"], [f"{prefix}.scaled"]),
            helper.make_node("Mul", [f"{prefix}.scaled", f"{prefix}.scale"], list(node.output)),
        ]
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([-1]), "preselect.last"),
            numpy_helper.from_array(np.array(1e-12, np.float32), "preselect.least"),
            numpy_helper.from_array(np.array(1 / 127, np.float32), "preselect.step"),
            numpy_helper.from_array(np.array(128, np.float32), "preselect.middle"),
            numpy_helper.from_array(np.array(128, np.uint8), "preselect.zero"),
        ]
    )
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The products with a weight, except those that stay exact; gives every node a name."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products = []
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"node-{number}"
        if node.op_type == "MatMul" and node.input[1] in weights and node.input[1].split(".")[-1] not in EXACT:
            products.append(node)
    return products


def _int8(model: onnx.ModelProto, images: Sequence[NDArray[np.float32]]) -> onnx.ModelProto:
    products = _products(preselect(model))
    lost = losses(model, products, images) if images else {}
    names = [node.name for node in products if lost.get(node.name, 0.0) <= LOSS]
    level = logging.getLogger().level
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "int8.onnx"
        logging.getLogger().setLevel(logging.ERROR)  # it logs advice to use another tool
        try:
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=names,
                use_external_data_format=True,
            )
        finally:
            logging.getLogger().setLevel(level)
        return onnx.load(path)


def _fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    products: Mapping[str, onnx.NodeProto] = {node.name: node for node in _products(model)}
    weights = {node.input[1] for node in products.values()}
    branches = [part.g for node in model.graph.node for part in node.attribute if part.HasField("g")]
    elsewhere = {name for branch in branches for node in branch.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name in weights]:
        with np.errstate(over="ignore"):  # an overflow fails the agreement check
            half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}.fp16")
        if tensor.name in elsewhere:
            model.graph.initializer.append(half)
        else:
            tensor.CopyFrom(half)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.name not in products:
            nodes.append(node)
            continue
        x, weight = node.input
        (output,) = node.output
        half_names = [f"{node.name}.{part}.fp16" for part in ("in", "out")]
        nodes += [
            helper.make_node("Cast", [x], [half_names[0]], to=TensorProto.FLOAT16),
            helper.make_node("MatMul", [half_names[0], f"{weight}.fp16"], [half_names[1]], name=node.name),
            helper.make_node("Cast", [half_names[1]], [output], to=TensorProto.FLOAT),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
