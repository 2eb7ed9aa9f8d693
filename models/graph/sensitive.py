"""Which products of a vision graph lose too much in 8 bits, measured on images.

ONNX Runtime quantises a product's input with one scale for all of its tokens and channels. One token that an MLP writes
very large (ViTs have such tokens; in a real ViT-Ti/16 the hidden values of layer 7 reach 216, where others stay below
15) sets that scale, and nothing is left of the others but a few steps. Such a product spoils all layers after it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from vitrine.models.bundle.layout import DETAILS_INPUT
from vitrine.models.precision.sessions import session_options

IMAGES = 8  # that are enough to see it
LOSS = 0.04  # of a product's output, relative, at the median token; without such tokens it is 0.01 to 0.025


def losses(
    model: onnx.ModelProto, products: Sequence[onnx.NodeProto], images: Sequence[NDArray[np.float32]]
) -> dict[str, float]:
    """By each product's name, the relative error of its output in 8 bits at the median token.

    products: nodes of `model` that multiply by a weight; images: batches of normalised pixels [B, 3, H, W], of which
    the first `IMAGES` are run, one at a time.
    """
    read = {product.input[1] for product in products}
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name in read}
    rounded = {name: _round_weight(weight) for name, weight in weights.items()}
    names = list(dict.fromkeys(product.input[0] for product in products))
    found: dict[str, list[NDArray[np.floating]]] = {product.name: [] for product in products}
    with tempfile.TemporaryDirectory() as scratch:
        path = _with_outputs(model, names, Path(scratch))
        session = InferenceSession(path, session_options(), providers=["CPUExecutionProvider"])
        for pixels in _one_at_a_time(images):
            feeds = {"pixels": pixels, DETAILS_INPUT: np.array(False)}
            inputs = dict(zip(names, session.run(names, feeds), strict=True))
            for product in products:
                x, weight = inputs[product.input[0]], product.input[1]
                exact = x @ weights[weight]
                error = _round_input(x) @ rounded[weight] - exact
                size = np.maximum(np.linalg.norm(exact, axis=-1), 1e-12)
                found[product.name].append((np.linalg.norm(error, axis=-1) / size).ravel())
    return {name: float(np.median(np.concatenate(errors))) for name, errors in found.items()}


def _with_outputs(model: onnx.ModelProto, names: Sequence[str], folder: Path) -> Path:
    """A file of the model that also gives these tensors."""
    probed, path = copy.deepcopy(model), folder / "probed.onnx"
    probed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    onnx.save_model(probed, path, save_as_external_data=True, location="probed.data")
    return path


def _one_at_a_time(images: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    return [pixels[at : at + 1] for pixels in images for at in range(len(pixels))][:IMAGES]


def _round_weight(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """[in, out] to the nearest of 255 steps, a scale for each output, symmetric, as `quantize_dynamic` does."""
    step = np.maximum(np.abs(weight).max(0), 1e-12) / 127
    return np.round(weight / step) * step


def _round_input(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """To the nearest of 256 steps between its least and largest value, or 0, as DynamicQuantizeLinear does."""
    least, largest = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = max(largest - least, 1e-12) / 255
    zero = round(-least / step)
    return (np.clip(np.round(x / step) + zero, 0, 255) - zero).astype(np.float32) * np.float32(step)
