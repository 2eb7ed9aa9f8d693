"""Byte products are right: the usual kernels are tried with a sum that is known, then the slower ones."""

import base64
import zlib

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from vitrine.models.precision import sessions
from vitrine.models.precision.sessions import PRECISE, ProductError, needs_precise_kernels, session_options


@pytest.fixture
def kernels(monkeypatch):
    """kernels("usual") -> pretend that only these give right sums; none: no kernels do."""

    def pretend(*right):
        def is_right(options):
            return ("slower" if _asks(options) else "usual") in right

        monkeypatch.setattr(sessions, "_is_right", is_right)
        needs_precise_kernels.cache_clear()

    yield pretend
    needs_precise_kernels.cache_clear()


def _asks(options):
    try:
        return options.get_session_config_entry(PRECISE) == "1"
    except RuntimeError:  # it was not set
        return False


def test_the_product_is_what_it_says():
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["sums"])],
        "byte product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [None, 64])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, [None, 16])],
        [numpy_helper.from_array(np.full((64, 16), 127, np.int8), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert zlib.decompress(base64.b64decode(sessions._PRODUCT)) == model.SerializeToString(deterministic=True)
    assert 2 * 255 * 127 > 2**15  # two products are more than 16 bits hold


def test_this_machine_is_right():
    needs_precise_kernels.cache_clear()
    assert sessions._is_right(session_options())
    assert sessions._is_right(session_options(precise=True))


def test_a_wrong_sum_is_seen(monkeypatch):
    """As on a processor that adds two products in 16 bits."""

    class Saturating:
        def __init__(self, *_, **__):
            pass

        def run(self, _, feeds):
            return [np.full((len(feeds["x"]), 16), 32 * (2**15 - 1))]

    monkeypatch.setattr(sessions.onnxruntime, "InferenceSession", Saturating)
    assert not sessions._is_right(None)


@pytest.mark.parametrize(("right", "asked"), [(("usual", "slower"), False), (("usual",), False), (("slower",), True)])
def test_slower_kernels_are_asked_for_only_where_the_usual_are_wrong(kernels, right, asked):
    kernels(*right)
    assert _asks(session_options()) == needs_precise_kernels() == asked
    assert _asks(session_options(precise=True))


def test_a_machine_without_right_kernels_is_refused(kernels):
    kernels()
    with pytest.raises(ProductError, match="multiplies bytes wrongly on this processor"):
        session_options()
