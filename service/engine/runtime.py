"""Chooses what a bundle's graphs run on, with reasons: provider, precision, threads. Once, before anything is loaded.

There is no silent fallback: a setting that cannot be satisfied stops the start with an error message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import Precision
from vitrine.models.errors import VitrineError
from vitrine.models.precision.instructions import int8_instructions
from vitrine.models.precision.sessions import ProductError, session_options
from vitrine.service.engine.processors import available_processors
from vitrine.service.operations.settings import Settings

# ONNX Runtime's errors for a file that is not a graph, or not one that it can run; they share no specific base class.
_SESSION_ERRORS = (
    ort.EPFail,
    ort.EngineError,
    ort.Fail,
    ort.InvalidArgument,
    ort.InvalidGraph,
    ort.InvalidProtobuf,
    ort.NoModel,
    ort.NoSuchFile,
    ort.NotFound,
    ort.NotImplemented,
    ort.RuntimeException,
    MemoryError,
)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class EngineError(VitrineError):
    """The graphs cannot run as configured; the message says what is missing."""


@dataclass(frozen=True)
class Runtime:
    """How sessions are created, with the reason for each choice."""

    provider: str  # ONNX Runtime's name
    precision: Precision  # of the vision graph
    threads: int  # per inference on the CPU
    options: Mapping[str, Mapping[str, Any]]  # by provider, the chosen one first, then its fallbacks
    reasons: Mapping[str, str]  # field -> why


def choose(bundle: Bundle, settings: Settings) -> Runtime:
    """The runtime for these settings. Raises `EngineError` if they cannot be satisfied."""
    provider = requested_provider(settings)
    precision, why_precision = _precision(bundle, settings)
    available, why_threads = available_processors()
    return Runtime(
        provider,
        precision,
        settings.threads or max(1, available // settings.workers),
        provider_options(settings),
        {
            "provider": f"VITRINE_PROVIDER={settings.provider}",
            "precision": why_precision,
            "threads": f"VITRINE_THREADS={settings.threads}"
            if settings.threads
            else why_threads + (f", divided among {settings.workers} workers" if settings.workers > 1 else ""),
        },
    )


def open_session(path: Path, runtime: Runtime, precise: bool | None = None) -> onnxruntime.InferenceSession:
    """A session for one graph. Raises `EngineError` if the file cannot be used, or not with that provider, or if this
    machine multiplies bytes wrongly. precise: as in `session_options`."""
    try:
        options = session_options(precise)
    except ProductError as error:
        raise EngineError(str(error)) from error
    options.intra_op_num_threads = runtime.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with session_errors(path):
        session = onnxruntime.InferenceSession(path, options, providers=list(runtime.options.items()))
    if session.get_providers()[0] != runtime.provider:
        raise EngineError(
            f"{runtime.provider} cannot be used for {path.name}: ONNX Runtime would use {session.get_providers()[0]} "
            "instead"
        )
    return session


@contextmanager
def session_errors(what: object) -> Iterator[None]:
    """While a graph is loaded or tried: turn ONNX Runtime's errors into `EngineError`, with what could not be used."""
    try:
        yield
    except _SESSION_ERRORS as error:
        raise EngineError(f"{what} cannot be used: {str(error) or 'there is not enough memory'}") from error


def requested_provider(settings: Settings) -> str:
    """ONNX Runtime's name for the configured provider. Raises `EngineError` if the installed onnxruntime lacks it."""
    requested, available = PROVIDERS[settings.provider], onnxruntime.get_available_providers()
    if requested not in available:
        raise EngineError(
            f"VITRINE_PROVIDER={settings.provider}, but the installed onnxruntime has only {', '.join(available)}; "
            "install vitrine[gpu] instead of vitrine[cpu], or set VITRINE_PROVIDER=cpu"
        )
    return requested


def _precision(bundle: Bundle, settings: Settings) -> tuple[Precision, str]:
    available, on_cpu, requested = bundle.manifest.precisions, settings.provider == "cpu", settings.precision
    if requested != "auto":
        if requested not in available:
            raise EngineError(
                f"VITRINE_PRECISION={requested}, but the bundle {bundle.manifest.name} has only {', '.join(available)}"
            )
        if requested != "fp32" and (requested == "int8") != on_cpu:
            target = "for the CPU" if requested == "int8" else "for GPUs"
            raise EngineError(
                f"VITRINE_PRECISION={requested} is only {target}, but VITRINE_PROVIDER={settings.provider}"
            )
        return requested, f"VITRINE_PRECISION={requested}"
    if not on_cpu:
        return ("fp16", "auto: a GPU") if "fp16" in available else ("fp32", "auto: a GPU, but the bundle has no fp16")
    instructions = int8_instructions()
    if instructions is None:
        return "fp32", "auto: this CPU has no int8 instructions"
    if "int8" not in available:
        return "fp32", f"auto: this CPU has {instructions}, but the bundle has no int8"
    return "int8", f"auto: this CPU has {instructions}"


def provider_options(settings: Settings) -> dict[str, dict[str, Any]]:
    """ONNX Runtime's options of each provider to use, by its name: the configured one first, then its fallbacks."""
    if settings.provider == "cpu":
        return {PROVIDERS["cpu"]: {}}
    cuda: dict[str, Any] = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    if settings.gpu_memory_bytes:
        cuda["gpu_mem_limit"] = settings.gpu_memory_bytes
    if settings.provider == "cuda":
        return {PROVIDERS["cuda"]: cuda}
    tensorrt: dict[str, Any] = {}
    if settings.tensorrt_cache:  # building TensorRT's engines takes minutes
        tensorrt = {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(settings.tensorrt_cache)}
    return {PROVIDERS["tensorrt"]: tensorrt, PROVIDERS["cuda"]: cuda}  # CUDA runs what TensorRT cannot
