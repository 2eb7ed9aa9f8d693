"""Whether a faster variant of the vision graph is right on this machine. What is wrong is refused, never served."""

from __future__ import annotations

from dataclasses import replace

from onnxruntime import InferenceSession

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import vision_file
from vitrine.models.precision.agreement import drawn_cosine
from vitrine.models.precision.instructions import int8_instructions
from vitrine.service.engine.runtime import PROVIDERS, EngineError, Runtime, open_session

SLACK = 0.01  # of the cosine where the bundle was exported
LEAST = 0.95  # for bundles that do not say what it was


def check_precision(bundle: Bundle, vision: InferenceSession, runtime: Runtime) -> None:
    """Raise `EngineError` if a variant disagrees with float32 here more than where it was exported and measured.

    Both are run on drawn pictures, unless this processor has the very instructions of the one that exported.
    """
    precision = runtime.precision
    if precision == "fp32":
        return
    agreement, here = bundle.manifest.agreement.get(precision), int8_instructions() or "none"
    there = agreement and agreement.instructions
    if runtime.provider == PROVIDERS["cpu"] and there == here:
        return
    reference = open_session(bundle.path / vision_file("fp32"), replace(runtime, precision="fp32"))
    cosine = drawn_cosine(reference, vision)
    expected = agreement.drawn_cosine if agreement else None
    least = LEAST if expected is None else expected - SLACK
    if not cosine >= least:
        known = "" if expected is None else f", and had {expected:.4f} where it was exported"
        raise EngineError(
            f"{bundle.path / vision_file(precision)} is wrong on this machine: its embeddings of drawn images have a "
            f"cosine of {cosine:.4f} with float32's{known}; at least {least:.4f} is required. int8 instructions: "
            f"{here} here, {there or 'not known'} there. Set VITRINE_PRECISION=fp32, or export the bundle on a "
            "machine like this one"
        )
