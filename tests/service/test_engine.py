"""ONNX Runtime on the tiny bundle."""

import os
import shutil

import numpy as np
import onnxruntime
import pytest
import torch

import service.engine
from models.bundle import DETAILS, DETAILS_INPUT, VISION_OUTPUTS, seal
from models.onnx_file import write_onnx
from service.engine import Engine, EngineError, available_processors, wanted_provider
from service.settings import Settings


def fields(parts):
    return {name: np.asarray(value) for name, value in vars(parts).items() if name != "details"}


def test_a_batch_of_five_equals_five_alone(engine, make_pixels):
    pixels = make_pixels(5, seed=1).numpy()
    together = engine.explain(pixels)
    assert len(together) == 5
    for index, found in enumerate(together):
        (alone,) = engine.explain(pixels[index : index + 1])
        for name, value in fields(alone).items():
            np.testing.assert_allclose(fields(found)[name], value, rtol=0, atol=1e-5, err_msg=name)


def test_decompositions_hold_the_graphs_outputs(engine, make_pixels):
    pixels = make_pixels(2, seed=2).numpy()
    feeds = {"pixels": pixels, DETAILS_INPUT: np.array(True)}
    outputs = dict(zip([*VISION_OUTPUTS, *DETAILS], engine.vision.run([*VISION_OUTPUTS, *DETAILS], feeds), strict=True))
    for index, parts in enumerate(engine.explain(pixels)):
        for name in ("embedding", "rows", "sigma_without", "feature_indices", "feature_values", "projection"):
            assert np.array_equal(getattr(parts, name), outputs[name][index]), name
        assert (parts.sigma, parts.norm) == (outputs["sigma"][index], outputs["norm"][index])
        assert [parts.r2, parts.cosine] == outputs["fidelity"][index].tolist()
        assert parts.details is None
    plain, detailed = engine.explain(pixels, [False, True])
    assert plain.details is None  # though its batch-mate's were computed
    for name in DETAILS:
        assert np.array_equal(getattr(detailed.details, name), outputs[name][1]), name


def test_bundle_older_than_details_is_served(bundle, graph, make_pixels, tmp_path):
    class Older(torch.nn.Module):
        def forward(self, pixels):
            return graph(pixels)[: len(VISION_OUTPUTS)]

    shutil.copytree(bundle.path, tmp_path / "older")
    (tmp_path / "older" / "attention.npy").unlink()
    write_onnx(Older(), torch.zeros(2, 3, 32, 32), "pixels", VISION_OUTPUTS, tmp_path / "older" / "vision.onnx")
    older = Engine(seal(tmp_path / "older", bundle.manifest), Settings())
    older.warm_up(2)
    pixels = make_pixels(2, seed=2).numpy()
    for found, expected in zip(older.explain(pixels), Engine(bundle, Settings()).explain(pixels), strict=True):
        np.testing.assert_allclose(found.rows, expected.rows, rtol=0, atol=1e-5)


def test_rows_add_up_to_the_embedding(engine, make_pixels):
    for parts in engine.explain(make_pixels(3, seed=3).numpy()):
        np.testing.assert_allclose(parts.rows.sum(0), parts.embedding, atol=1e-5)
        assert np.linalg.norm(parts.embedding) == pytest.approx(1, abs=1e-5)


def test_embeddings_are_the_clips(engine, clip, make_pixels):
    pixels = make_pixels(2, seed=4)
    expected = clip.model.encode_image(pixels, normalize=True).numpy()
    found = np.stack([parts.embedding for parts in engine.explain(pixels.numpy())])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_text_is_the_clips(engine, clip):
    tokens = clip.tokenizer(["a cat", "two dogs"])
    expected = clip.model.encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(engine.encode_text(tokens.numpy()), expected, atol=1e-5)


def test_warm_up_runs_both_graphs_at_both_batch_sizes(engine, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "explain", lambda pixels, details=(): seen.append(("vision", pixels.shape)))
    monkeypatch.setattr(engine, "encode_text", lambda tokens: seen.append(("text", len(tokens))))
    engine.warm_up(4)
    assert {shape for kind, shape in seen if kind == "vision"} == {(1, 3, 32, 32), (4, 3, 32, 32)}
    assert "text" in dict(seen)


def test_the_provider_in_use_is_named(engine):
    assert engine.provider == "CPUExecutionProvider"


def test_a_provider_that_is_not_there_is_refused(bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    settings = Settings(bundle=bundle.path, provider="cuda")
    for start in (lambda: wanted_provider(settings), lambda: Engine(bundle, settings)):
        with pytest.raises(EngineError, match=r"VITRINE_PROVIDER=cuda.*only CPUExecutionProvider.*"):
            start()


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)
def test_cuda_is_refused_on_this_machine(bundle):
    with pytest.raises(EngineError, match="vitrine\\[gpu\\]"):
        Engine(bundle, Settings(bundle=bundle.path, provider="cuda"))


def test_a_provider_that_onnxruntime_does_not_use_is_refused(bundle, monkeypatch):
    """As when CUDA's libraries are missing: onnxruntime falls back to the CPU with a remark in its log."""
    monkeypatch.setattr(service.engine, "wanted_provider", lambda settings: "CUDAExecutionProvider")

    class FallsBack(onnxruntime.InferenceSession):
        def __init__(self, path, options, providers):
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", FallsBack)
    with pytest.raises(EngineError, match=r"CUDAExecutionProvider could not be used for vision\.onnx"):
        Engine(bundle, Settings(bundle=bundle.path, provider="cuda"))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_are_as_set_or_those_available(bundle, threads):
    engine = Engine(bundle, Settings(bundle=bundle.path, threads=threads))
    for session in (engine.vision, engine.text):
        assert session.get_session_options().intra_op_num_threads == (threads or available_processors())


@pytest.mark.parametrize(
    ("cpu_max", "processors"),
    [
        (None, 8),
        ("max 100000", 8),
        ("400000 100000", 4),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("1600000 100000", 8),
        ("200000 50000\n", 4),
    ],
)
def test_available_processors_honour_the_containers_quota(monkeypatch, tmp_path, cpu_max, processors):
    quota = tmp_path / "cpu.max"
    if cpu_max is not None:
        quota.write_text(cpu_max)
    monkeypatch.setattr(service.engine, "Path", lambda path: quota if path == "/sys/fs/cgroup/cpu.max" else None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert available_processors() == processors


def test_available_processors_honour_the_affinity(monkeypatch, tmp_path):
    monkeypatch.setattr(service.engine, "Path", lambda path: tmp_path / "missing")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert available_processors() == 2
