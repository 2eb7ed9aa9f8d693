"""The bundle's ONNX graphs in ONNX Runtime. Knows nothing of labels or HTTP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from models.bundle import DETAILS, DETAILS_INPUT, VISION_OUTPUTS, Bundle
from models.errors import VitrineError
from models.ledger import Decomposition, Details
from service.settings import Settings

# What ONNX Runtime raises for a file that is no graph, or none that it can run; they share no base of their own.
_UNUSABLE = (
    ort.Fail,
    ort.InvalidArgument,
    ort.InvalidGraph,
    ort.InvalidProtobuf,
    ort.NoSuchFile,
    ort.NotImplemented,
    ort.RuntimeException,
)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class EngineError(VitrineError):
    """The graphs cannot run as set; the message says what is missing."""


class Engine:
    """Runs a bundle's two graphs. Thread-safe, but one thread at a time makes the best use of the processors.

    Raises `EngineError` when the set provider is not what ONNX Runtime would use: never a silent fall-back.
    """

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self.bundle = bundle
        self.vision = _session(bundle.path / "vision.onnx", settings)
        self.text = _session(bundle.path / "text.onnx", settings)

    @property
    def provider(self) -> str:
        """ONNX Runtime's name of the provider in use."""
        return self.vision.get_providers()[0]

    @property
    def has_details(self) -> bool:
        """Whether the bundle can be asked for `Details`; those of older versions cannot."""
        return self.bundle.attention_fold is not None

    def explain(self, pixels: NDArray[np.float32], details: Sequence[bool] = ()) -> list[Decomposition]:
        """Normalised pixels [B, 3, H, W] to what `models.ledger` accounts with, one an image.

        details: for which of them `Decomposition.details` is wanted; the default: for none.
        """
        names, feeds = [*VISION_OUTPUTS], {"pixels": pixels}
        if self.has_details:
            feeds[DETAILS_INPUT] = np.array(any(details))
        if any(details):
            names += DETAILS
        outputs = dict(zip(names, self.vision.run(names, feeds), strict=True))
        return [
            Decomposition(
                embedding=outputs["embedding"][i],
                rows=outputs["rows"][i],
                sigma=float(outputs["sigma"][i]),
                sigma_without=outputs["sigma_without"][i],
                norm=float(outputs["norm"][i]),
                feature_indices=outputs["feature_indices"][i],
                feature_values=outputs["feature_values"][i],
                projection=outputs["projection"][i],
                r2=float(outputs["fidelity"][i, 0]),
                cosine=float(outputs["fidelity"][i, 1]),
                details=Details(**{name: outputs[name][i] for name in DETAILS}) if wanted else None,
            )
            for i, wanted in enumerate(details or [False] * len(pixels))
        ]

    def encode_text(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Tokens [N, context] to unit text embeddings [N, D]."""
        return self.text.run(["text_embedding"], {"tokens": tokens})[0]

    def warm_up(self, batch_size: int) -> None:
        """Run both graphs once at a batch of one and once at the largest, so that no request pays for it."""
        manifest = self.bundle.manifest
        for batch in {1, batch_size}:
            pixels = np.zeros((batch, 3, *manifest.preprocessing.size), np.float32)
            self.explain(pixels)
            if self.has_details:
                self.explain(pixels, [True] * batch)
            self.encode_text(np.zeros((batch, manifest.text.context), np.int64))


def wanted_provider(settings: Settings) -> str:
    """ONNX Runtime's name of the set provider. Raises `EngineError` if the installed onnxruntime lacks it."""
    wanted, present = PROVIDERS[settings.provider], onnxruntime.get_available_providers()
    if wanted not in present:
        raise EngineError(
            f"VITRINE_PROVIDER={settings.provider}, but the installed onnxruntime has only {', '.join(present)}; "
            "install vitrine[gpu] in place of vitrine[cpu], or set VITRINE_PROVIDER=cpu"
        )
    return wanted


def available_processors() -> int:
    """Processors that this process may use: its affinity, or the container's quota if that is less.

    ONNX Runtime looks at the machine's processors alone, and runs slower for it in a container with a quota.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            processors = min(processors, max(1, int(limit) // int(period)))
    return processors


def _session(path: Path, settings: Settings) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads or available_processors()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = wanted_provider(settings)
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[wanted])
    except _UNUSABLE as error:
        raise EngineError(f"{path} cannot be used: {error}") from error
    if session.get_providers()[0] != wanted:
        raise EngineError(
            f"{wanted} could not be used for {path.name}; ONNX Runtime would use {session.get_providers()[0]}"
        )
    return session
