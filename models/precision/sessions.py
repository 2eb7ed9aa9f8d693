"""ONNX Runtime's options for the graphs of a bundle, with byte products whose sums are right.

int8 graphs, and the encoders of float32 ones (`models.graph.variants.preselect`), multiply unsigned by signed bytes. On
x86 processors without VNNI ONNX Runtime's kernel for them adds two products in 16 bits, which cannot hold them: the sum
stops at 32,767, and the result is wrong without a word. ONNX Runtime has other kernels for such processors, slower and
right, and must be asked for them. Here it is asked if a product whose sum is known comes out wrong, and not by what the
processor is called: on processors with AMX, where all is well, asking would take the fast kernels away.
"""

from __future__ import annotations

import base64
import zlib
from functools import cache

import numpy as np
import onnxruntime

from vitrine.models.errors import VitrineError

PRECISE = "session.x64quantprecision"  # "1": the slower kernels
# An ONNX graph, `x` [M, 64] of unsigned bytes times 64 x 16 weights of 127 -> `sums`; a test makes it anew.
_PRODUCT = (
    "eNrj4LJ6y8GlwMVYwcVWnpqZnlEixFJcmlusxOubWOJbmuOZV5KanlokxJNUWZKqUFCUn1KaXKI1kYPDgUNAgNkJqsergaN+FIyCUTBiQZQgsAwR4uHi"
    "4mASYuNi4GLicEgS4QKXJWBRNqiogBMLF4OACAD0gRaB"
)
_ROWS = (1, 17)  # ONNX Runtime multiplies one row otherwise than many


class ProductError(VitrineError):
    """ONNX Runtime multiplies bytes wrongly on this machine, whatever it is asked for."""


def session_options(precise: bool | None = None) -> onnxruntime.SessionOptions:
    """Options for a session on the CPU, where byte products are right.

    precise: True asks for the slower kernels; None: if they are needed. Raises `ProductError` if none are right.
    """
    options = onnxruntime.SessionOptions()
    if needs_precise_kernels() if precise is None else precise:
        options.add_session_config_entry(PRECISE, "1")
    return options


@cache
def needs_precise_kernels() -> bool:
    """Whether ONNX Runtime's usual byte products are wrong on this machine. Raises `ProductError` if all are."""
    if _is_right(session_options(precise=False)):
        return False
    if _is_right(session_options(precise=True)):
        return True
    raise ProductError(
        f"ONNX Runtime {onnxruntime.__version__} multiplies bytes wrongly on this processor: a known sum came out "
        f"wrong, even with the option that should correct it. No graph of a bundle would be right here; use another "
        f"processor or another version of ONNX Runtime"
    )


def _is_right(options: onnxruntime.SessionOptions) -> bool:
    session = onnxruntime.InferenceSession(
        zlib.decompress(base64.b64decode(_PRODUCT)), options, providers=["CPUExecutionProvider"]
    )
    return all(
        (session.run(None, {"x": np.full((rows, 64), 255, np.uint8)})[0] == 64 * 255 * 127).all() for rows in _ROWS
    )
