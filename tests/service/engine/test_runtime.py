"""The graphs run on what the settings say, or the start fails with the reason."""

from dataclasses import replace

import onnxruntime
import pytest

import vitrine.service.engine.runtime
from vitrine.models.precision import instructions
from vitrine.models.precision.instructions import int8_instructions
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.processors import available_processors
from vitrine.service.engine.runtime import (
    PROVIDERS,
    EngineError,
    choose,
    requested_provider,
)
from vitrine.service.operations.settings import Settings


def test_a_provider_that_is_not_there_is_refused(bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    settings = Settings(bundle=bundle.path, provider="cuda")
    for start in (lambda: requested_provider(settings), lambda: Engine(bundle, settings)):
        with pytest.raises(EngineError, match=r"VITRINE_PROVIDER=cuda.*only CPUExecutionProvider.*"):
            start()


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)
def test_cuda_is_refused_on_this_machine(bundle):
    with pytest.raises(EngineError, match="vitrine\\[gpu\\]"):
        Engine(bundle, Settings(bundle=bundle.path, provider="cuda"))


def test_a_provider_that_onnxruntime_does_not_use_is_refused(bundle, monkeypatch):
    """As when CUDA's libraries are missing: onnxruntime falls back to the CPU with a warning in its log."""
    monkeypatch.setattr(vitrine.service.engine.runtime, "requested_provider", lambda settings: "CUDAExecutionProvider")

    class FallsBack(onnxruntime.InferenceSession):
        def __init__(self, path, options, providers):
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", FallsBack)
    with pytest.raises(EngineError, match=r"CUDAExecutionProvider cannot be used for vision\.onnx"):
        Engine(bundle, Settings(bundle=bundle.path, provider="cuda"))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_are_as_set_or_those_available(bundle, threads):
    engine = Engine(bundle, Settings(bundle=bundle.path, threads=threads))
    for session in (engine.vision, engine.text):
        assert session.get_session_options().intra_op_num_threads == (threads or available_processors()[0])


@pytest.fixture
def bundle_with(bundle):
    """bundle_with("fp32", "int8") -> the tiny bundle, declared to have these precisions."""
    return lambda *names: replace(bundle, manifest=bundle.manifest.model_copy(update={"precisions": names}))


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """cpu("avx2 avx512_vnni") -> pretend that this CPU has these flags."""

    def set_flags(flags):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse2\n")
        files = {"/proc/cpuinfo": tmp_path / "cpuinfo"}
        monkeypatch.setattr(instructions, "Path", lambda path: files.get(path, tmp_path / "missing"))

    return set_flags


@pytest.fixture
def every_provider(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))


AUTO = [
    ("cpu", "avx512_vnni", ("fp32", "int8", "fp16"), "int8", "auto: this CPU has AVX-512 VNNI"),
    ("cpu", "avx_vnni avx2", ("fp32", "int8"), "int8", "auto: this CPU has AVX VNNI"),
    ("cpu", "avx512f", ("fp32", "int8"), "fp32", "auto: this CPU has no int8 instructions"),
    ("cpu", "avx512_vnni", ("fp32", "fp16"), "fp32", "auto: this CPU has AVX-512 VNNI, but the bundle has no int8"),
    ("cuda", "avx512_vnni", ("fp32", "int8", "fp16"), "fp16", "auto: a GPU"),
    ("tensorrt", "", ("fp32", "int8"), "fp32", "auto: a GPU, but the bundle has no fp16"),
]


@pytest.mark.parametrize(("provider", "flags", "present", "precision", "why"), AUTO)
def test_auto_is_the_fastest_that_there_is(cpu, every_provider, bundle_with, provider, flags, present, precision, why):
    cpu(flags)
    runtime = choose(bundle_with(*present), Settings(provider=provider, precision="auto"))
    assert (runtime.precision, runtime.reasons["precision"]) == (precision, why)


@pytest.mark.parametrize("precision", ["fp32", "int8", "fp16"])
def test_precision_is_as_set_whatever_the_cpu(cpu, every_provider, bundle_with, precision):
    cpu("")
    provider = "cuda" if precision == "fp16" else "cpu"
    runtime = choose(bundle_with("fp32", "int8", "fp16"), Settings(provider=provider, precision=precision))
    assert (runtime.precision, runtime.reasons["precision"]) == (precision, f"VITRINE_PRECISION={precision}")


@pytest.mark.parametrize(
    ("provider", "precision", "present", "message"),
    [
        ("cpu", "int8", ("fp32",), "VITRINE_PRECISION=int8, but the bundle tiny has only fp32"),
        ("cuda", "fp16", ("fp32", "int8"), "VITRINE_PRECISION=fp16, but the bundle tiny has only fp32, int8"),
        ("cuda", "int8", ("fp32", "int8"), "VITRINE_PRECISION=int8 is only for the CPU, but VITRINE_PROVIDER=cuda"),
        ("cpu", "fp16", ("fp32", "fp16"), "VITRINE_PRECISION=fp16 is only for GPUs, but VITRINE_PROVIDER=cpu"),
    ],
)
def test_precision_that_cannot_be_had_is_refused(every_provider, bundle_with, provider, precision, present, message):
    with pytest.raises(EngineError, match=message):
        choose(bundle_with(*present), Settings(provider=provider, precision=precision))


def test_options_go_to_the_provider_that_takes_them(every_provider, bundle, tmp_path):
    settings = Settings(provider="tensorrt", tensorrt_cache=tmp_path, gpu_memory_bytes=1000)
    options = choose(bundle, settings).options
    assert list(options) == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    assert options["TensorrtExecutionProvider"]["trt_engine_cache_path"] == str(tmp_path)
    assert options["CUDAExecutionProvider"]["gpu_mem_limit"] == 1000
    assert list(choose(bundle, Settings(provider="cuda")).options) == ["CUDAExecutionProvider"]


def test_int8_instructions_of_an_arm_cpu(cpu):
    cpu("asimd asimddp")
    assert int8_instructions() == "Arm dot products"
