"""ONNX Runtime on the tiny bundle."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitrine.models.bundle.layout import DETAILS, DETAILS_INPUT, EVERY_OUTPUT, VISION_OUTPUTS
from vitrine.models.bundle.sealing import seal
from vitrine.models.graph.onnx_file import save_onnx, to_onnx
from vitrine.service.engine.engine import Engine, _batches
from vitrine.service.operations.settings import Settings


def fields(parts):
    return {name: np.asarray(value) for name, value in vars(parts).items() if name != "details" and value is not None}


def test_a_batch_of_five_equals_five_alone(engine, make_pixels):
    pixels = make_pixels(5, seed=1).numpy()
    together = engine.explain(pixels)
    assert len(together) == 5
    for index, decomposition in enumerate(together):
        (alone,) = engine.explain(pixels[index : index + 1])
        assert alone.components is decomposition.components is None
        for name, value in fields(alone).items():
            np.testing.assert_allclose(fields(decomposition)[name], value, rtol=0, atol=1e-5, err_msg=name)


def test_decompositions_hold_the_graphs_outputs(engine, make_pixels):
    pixels = make_pixels(2, seed=2).numpy()
    feeds = {"pixels": pixels, DETAILS_INPUT: np.array(True)}
    outputs = dict(zip(EVERY_OUTPUT, engine.vision.run(EVERY_OUTPUT, feeds), strict=True))
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
    model = to_onnx(Older(), {"pixels": torch.zeros(2, 3, 32, 32)}, VISION_OUTPUTS)
    save_onnx(model, tmp_path / "older" / "vision.onnx")
    older = Engine(seal(tmp_path / "older", bundle.manifest), Settings())
    older.warm_up()
    pixels = make_pixels(2, seed=2).numpy()
    for decomposition, expected in zip(older.explain(pixels), Engine(bundle, Settings()).explain(pixels), strict=True):
        np.testing.assert_allclose(decomposition.rows, expected.rows, rtol=0, atol=1e-5)


def test_rows_add_up_to_the_embedding(engine, make_pixels):
    for parts in engine.explain(make_pixels(3, seed=3).numpy()):
        np.testing.assert_allclose(parts.rows.sum(0), parts.embedding, atol=1e-5)
        assert np.linalg.norm(parts.embedding) == pytest.approx(1, abs=1e-5)


def test_embeddings_are_the_clips(engine, clip, make_pixels):
    pixels = make_pixels(2, seed=4)
    expected = clip.model.encode_image(pixels, normalize=True).numpy()
    embeddings = np.stack([parts.embedding for parts in engine.explain(pixels.numpy())])
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def test_text_is_the_clips(engine, clip):
    tokens = clip.tokenizer(["a cat", "two dogs"])
    expected = clip.model.encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(engine.encode_text(tokens.numpy()), expected, atol=1e-5)
    np.testing.assert_allclose(engine.encode_text(tokens.numpy()[:, :4]), expected, atol=1e-5)  # "two dogs" has four
    texts = [[token for token in text if token] for text in tokens.tolist()]
    np.testing.assert_allclose(engine.encode_texts(texts), expected, atol=1e-5)


def test_warm_up_runs_both_graphs_at_both_batch_sizes(bundle, monkeypatch):
    engine, calls = Engine(bundle, Settings(batch_size=4)), []
    monkeypatch.setattr(engine, "explain", lambda pixels, *_: calls.append(("vision", pixels.shape)))
    encode_text = engine.encode_text
    monkeypatch.setattr(
        engine, "encode_text", lambda tokens: calls.append(("text", tokens.shape)) or encode_text(tokens)
    )
    engine.warm_up()
    assert {shape for kind, shape in calls if kind == "vision"} == {(1, 3, 32, 32), (4, 3, 32, 32)}
    assert {length for kind, (_, length, *_) in calls if kind == "text"} == {8, 16}


@pytest.mark.parametrize(
    ("largest", "on_gpu", "batches"),
    [(8, False, [1, 8]), (1, False, [1]), (8, True, [1, 2, 4, 8]), (6, True, [1, 2, 4, 6]), (1, True, [1])],
)
def test_sizes_of_batch(largest, on_gpu, batches):
    assert _batches(largest, on_gpu) == batches


@pytest.mark.parametrize(("count", "run"), [(1, 1), (3, 4), (4, 4), (5, 6), (7, 7)])
def test_batches_are_filled_up_on_a_gpu_alone(bundle, make_pixels, monkeypatch, count, run):
    engine, pixels = Engine(bundle, Settings(batch_size=6)), make_pixels(count).numpy()
    plain = engine.explain(pixels)
    engine.on_gpu, engine.batches = True, _batches(6, True)
    sizes, session = [], engine.vision
    monkeypatch.setattr(
        engine, "vision", SimpleNamespace(run=lambda *a: sizes.append(len(a[1]["pixels"])) or session.run(*a))
    )
    decompositions = engine.explain(pixels, [True] * count)
    assert sizes == [run]
    assert len(decompositions) == count
    for one, other in zip(decompositions, plain, strict=True):
        np.testing.assert_allclose(one.rows, other.rows, rtol=0, atol=1e-5)


def test_the_provider_in_use_is_named(engine):
    assert engine.provider == "CPUExecutionProvider"
