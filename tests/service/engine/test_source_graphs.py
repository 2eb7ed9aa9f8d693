"""What the engine does with a bundle's source graphs, and refuses."""

import shutil

import numpy as np
import onnx
import pytest

from vitrine.models.account.sources import accounts
from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.layout import BASELINE
from vitrine.models.bundle.sealing import seal
from vitrine.service.answers.attention import attention_heads
from vitrine.service.answers.explain import check_explain
from vitrine.service.answers.sources import source_baselines
from vitrine.service.engine.engine import Engine
from vitrine.service.errors import ServiceError
from vitrine.service.offline.verify import verify
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attention import HeadQuestion
from vitrine.service.schemas.attribute import Explain

HEAD = Explain(attention=HeadQuestion(layer=1, head=0))


@pytest.fixture
def change(bundle, tmp_path):
    """change(edit) -> the bundle with edit(copy's path) made to it."""

    def make(edit):
        copy = shutil.copytree(bundle.path, tmp_path / "copy")
        edit(copy)
        return seal(copy, bundle.manifest)

    return make


def without(*names):
    def edit(path):
        for name in names:
            (path / name).unlink()

    return edit


def refused(explain, engine):
    with pytest.raises(ServiceError) as caught:
        check_explain(explain, ("cat",), 10, engine)
    assert caught.value.code == "invalid_request"
    return caught.value.message


def test_an_image_has_one_trace_for_all_directions(engine, bundle, make_pixels):
    pixels = make_pixels(1, seed=3).numpy()
    directions = np.random.default_rng(0).normal(size=(4, bundle.manifest.shape.embedding)).astype(np.float32)
    trace, outputs = engine.sources.run(pixels[0], directions)
    (parts,) = engine.explain(pixels)
    np.testing.assert_allclose(trace.embedding, parts.embedding, atol=1e-5)
    assert trace.scale == pytest.approx(float(parts.sigma * parts.norm), rel=1e-4)
    together = accounts(trace, outputs, directions, bundle.beta, 1.0)
    for n, sources in enumerate(together):
        alone = accounts(*engine.sources.run(pixels[0], directions[n : n + 1]), directions[n : n + 1], bundle.beta, 1.0)
        np.testing.assert_allclose(sources.features, alone[0].features, atol=1e-4)


def test_a_bundle_without_them_says_so(change):
    older = change(without("trace.onnx", "sources.onnx", "sources.onnx.data", *BASELINE))
    engine = Engine(older, Settings(bundle=older.path))
    assert engine.sources is None
    assert "exported without them" in refused(Explain(sources=True), engine)
    assert source_baselines(engine) == []


def test_they_can_be_left_unloaded(bundle):
    engine = Engine(bundle, Settings(bundle=bundle.path, sources=False))
    assert "VITRINE_SOURCES=false" in refused(Explain(sources=True), engine)
    assert source_baselines(engine) == []


def test_a_bundle_from_before_accounts_of_attention_says_so(change):
    older = change(without("scores.onnx"))
    engine = Engine(older, Settings(bundle=older.path))
    check_explain(Explain(sources=True), ("cat",), 10, engine)
    assert "is from a version without accounts of attention; export it again" in refused(HEAD, engine)
    assert attention_heads(engine) == 0
    verify(older.path)


def test_accounts_of_attention_need_the_source_graphs(change, bundle):
    unloaded = Engine(bundle, Settings(bundle=bundle.path, sources=False))
    assert "VITRINE_SOURCES=false" in refused(HEAD, unloaded)
    assert attention_heads(unloaded) == 0
    names = ("trace.onnx", "sources.onnx", "sources.onnx.data", "scores.onnx", *BASELINE)
    older = change(without(*names))
    assert "has no source graphs" in refused(HEAD, Engine(older, Settings(bundle=older.path)))


def test_scores_are_those_of_the_networks_weights(engine, make_pixels):
    """Of every head, for every query; and whoever asks for no key gets the one that it looks at most."""
    graphs = engine.sources
    trace = graphs.trace(make_pixels(1, seed=3).numpy()[0])
    assert attention_heads(engine) == 4
    for layer, head, query in np.ndindex(3, 4, 17):
        score = graphs.attention_score(trace, layer, head, query, None, True)
        weights = np.exp(score.scores - score.scores.max())
        np.testing.assert_allclose(weights / weights.sum(), trace.weights[layer, head, query], atol=1e-5)
        assert score.key == trace.weights[layer, head, query].argmax()
        logarithms = np.log(trace.weights[layer, head, query])
        assert score.total == pytest.approx(logarithms.max() - logarithms.mean(), abs=1e-4)


def test_a_bundle_without_an_average_picture_says_so(change):
    built = change(without(*BASELINE))
    engine = Engine(built, Settings(bundle=built.path))
    check_explain(Explain(sources=True), ("cat",), 10, engine)
    assert "no average image" in refused(Explain(sources=True, baseline="mean"), engine)
    assert source_baselines(engine) == ["zero"]


def test_an_average_picture_of_another_shape_is_refused(change):
    built = change(lambda path: np.save(path / BASELINE[0], np.zeros((3, 2, 5), np.float32)))
    with pytest.raises(BundleError, match=rf"{BASELINE[0]} cannot be used"):
        _ = open_bundle(built.path).baseline


@pytest.mark.parametrize(
    ("file", "rename", "said"),
    [
        ("trace.onnx", "before_mlp", "has no output before_mlp"),
        ("sources.onnx", "gradients", "has no output gradients"),
        ("sources.onnx", "written", "has an input written.other"),
        ("scores.onnx", "keys", "has no output keys"),
        ("scores.onnx", "head", "has an input head.other"),
    ],
)
def test_graphs_of_another_kind_are_refused(change, file, rename, said):
    def edit(path):
        model = onnx.load(path / file, load_external_data=False)
        for values in (model.graph.input, model.graph.output):
            for value in values:
                value.name = f"{value.name}.other" if value.name == rename else value.name
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [f"{name}.other" if name == rename else name for name in names]
        onnx.save_model(model, path / file)

    built = change(edit)
    engine = Engine(built, Settings(bundle=built.path))
    for _ in range(2):  # it stays closed
        with pytest.raises(BundleError, match=rf"{file}.*{said}"):
            engine.sources.open()
    assert not engine.sources.is_open


@pytest.mark.parametrize(
    ("file", "name", "said"),
    [
        ("trace.onnx", "tower.blocks.0.mlp.c_proj.bias", "differs from that of vision.onnx"),
        ("sources.onnx", "tower.blocks.1.ln_1.weight", "differ from the logit"),
        ("scores.onnx", "attention.1.ln.weight", "differ from the attention weights"),
    ],
)
def test_graphs_that_do_not_belong_together_are_noticed(change, file, name, said):
    """With other weights each runs, and nothing is NaN."""

    def edit(path):
        model = onnx.load(path / file)
        (moved,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        values = 2 * onnx.numpy_helper.to_array(moved)
        moved.CopyFrom(onnx.numpy_helper.from_array(values, moved.name))
        onnx.save_model(model, path / file)

    with pytest.raises(BundleError, match=said):
        verify(change(edit).path)
