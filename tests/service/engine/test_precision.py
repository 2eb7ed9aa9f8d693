"""A precision that is wrong on this machine is refused with the reason, by the engine and by `verify --precision`."""

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.bundle.manifest import Agreement
from vitrine.models.precision import sessions
from vitrine.models.precision.agreement import drawn_pixels
from vitrine.models.precision.instructions import int8_instructions
from vitrine.models.precision.sessions import needs_precise_kernels
from vitrine.service.engine import precision
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.runtime import EngineError
from vitrine.service.offline.agreement import agreement
from vitrine.service.operations.settings import DEMO_BUNDLE, Settings

INT8 = Settings(precision="int8", replacement=False)


@pytest.fixture(scope="module")
def demo():
    return open_bundle(DEMO_BUNDLE)


@pytest.fixture
def exported(demo):
    """exported(instructions, cosine) -> the demo, as if its int8 had been exported and measured so."""

    def claim(instructions, cosine):
        measured = demo.manifest.agreement["int8"]
        claimed = measured.model_copy(update={"instructions": instructions, "drawn_cosine": cosine})
        return replace(demo, manifest=demo.manifest.model_copy(update={"agreement": {"int8": claimed}}))

    return claim


def test_drawn_pictures_are_the_same_everywhere():
    pixels = drawn_pixels(32, 48)
    assert pixels.shape == (4, 3, 32, 48)
    np.testing.assert_allclose(pixels[0, 0, 0, :3], [1.229027, 1.003440, 0.769379], rtol=1e-5)


def test_a_bundle_from_elsewhere_is_measured_here(exported, monkeypatch):
    measured = []
    real = precision.drawn_cosine
    monkeypatch.setattr(precision, "drawn_cosine", lambda *graphs: measured.append(real(*graphs)) or measured[-1])
    Engine(exported(int8_instructions() or "none", 1.0), INT8)
    assert not measured  # exported on such a machine
    Engine(exported(None, None), INT8)  # older bundles do not say
    Engine(exported("another", measured[0]), INT8)
    assert len(measured) == 2
    assert 0.99 < measured[0] < 1
    Engine(exported("another", 2.0), INT8.model_copy(update={"precision": "fp32"}))
    with pytest.raises(
        EngineError, match=r"vision.int8.onnx is wrong on this machine: .* and had 2.0000 where it was exp"
    ):
        Engine(exported("another", 2.0), INT8)


def test_a_precision_that_multiplies_wrongly_is_refused(exported, monkeypatch):
    monkeypatch.setattr(precision, "drawn_cosine", lambda *_: 0.9)
    with pytest.raises(EngineError, match=r"a cosine of 0\.9000 .* at least 0\.9500 .* Set VITRINE_PRECISION=fp32"):
        Engine(exported(None, None), INT8)
    monkeypatch.setattr(precision, "drawn_cosine", lambda *_: float("nan"))
    with pytest.raises(EngineError, match="is wrong on this machine"):
        Engine(exported(None, None), INT8)


def test_a_machine_that_multiplies_wrongly_serves_nothing(demo, monkeypatch):
    monkeypatch.setattr(sessions, "_is_right", lambda options: False)
    needs_precise_kernels.cache_clear()
    with pytest.raises(EngineError, match="multiplies bytes wrongly on this processor"):
        Engine(demo, Settings())
    needs_precise_kernels.cache_clear()


def test_float32_computed_by_other_kernels_is_the_same(demo):
    report = agreement(demo, Settings(), "fp32", Console(quiet=True))
    assert report.drawn_cosine == pytest.approx(1, abs=1e-6)
    assert report.at_export is None
    assert report.problem is None


@pytest.mark.parametrize("name", ["top1", "ledger_cosine", "top_features"])
def test_what_misses_the_gate_is_a_problem(demo, name):
    report = agreement(demo, Settings(), "int8", Console(quiet=True))
    assert report.problem is None  # drawn pictures alone
    good = Agreement(images=8, top1=1, ledger_cosine=1, top_features=1)
    assert report.model_copy(update={"here": good}).problem is None
    bad = report.model_copy(update={"here": good.model_copy(update={name: 0.5})})
    assert "int8 does not agree with float32 on this machine: on 8 images" in bad.problem
