"""Interventions in the running network as the engine runs them, and what has to be known of a bundle for them."""

import shutil

import numpy as np
import pytest
import torch

from vitrine.models.bundle.bundle import BundleError
from vitrine.models.bundle.layout import ALWAYS
from vitrine.models.bundle.sealing import seal
from vitrine.models.dictionary.average import mean_code
from vitrine.models.graph.rerun import RerunGraph
from vitrine.models.graph.residual_rerun import ResidualRerunGraph
from vitrine.models.interventions.batch import stacked
from vitrine.models.interventions.changes import InterventionError, resolve
from vitrine.models.interventions.network import BundleNetwork
from vitrine.models.interventions.spec import Intervention
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.rerun import RerunGraphs
from vitrine.service.offline.verify import verify
from vitrine.service.operations.settings import Settings


def resolved(bundle, *items):
    return resolve([Intervention(**item) for item in items], BundleNetwork(bundle), "rerun")


SEVERAL = (
    {"op": "set", "layer": 0, "index": 5, "value": 1.5},
    {"op": "ablate", "layer": 1, "index": 7, "to": "mean", "tokens": "patches"},
    {"op": "project", "layer": 0, "index": 9, "direction": "encoder", "to": "mean"},
    {"op": "scale", "layer": 1, "head": 2, "value": 0.5},
)


@pytest.mark.parametrize("items", [(), SEVERAL])
def test_engine_makes_them_as_torch_does(engine, bundle, graph, clt, make_pixels, items):
    """Also where no feature and no direction is changed: then the answer is the vision graph's."""
    pixels, changes = make_pixels(2, seed=3), resolved(bundle, *items)
    parts = engine.rerun.run(pixels.numpy(), [changes, changes])
    with torch.no_grad():
        expected = RerunGraph(graph, clt, torch.float32)(
            pixels, *(torch.from_numpy(np.ascontiguousarray(part)) for part in stacked([changes, changes]).values())
        )
    for image, found in enumerate(parts):
        np.testing.assert_allclose(found.embedding, expected[0][image], atol=1e-5)
        np.testing.assert_allclose(found.components, expected[ALWAYS.index("components")][image], atol=1e-4)
    if not items:
        for found, own in zip(parts, engine.explain(pixels.numpy(), components=[True, True]), strict=True):
            np.testing.assert_allclose(found.rows[:-1], own.rows, atol=1e-5)
            np.testing.assert_allclose(found.components[:-1], own.components, atol=1e-4)


def test_features_of_residual_saes(with_residual, graph, residual_export, make_pixels):
    """Exported beside a bundle whose CLT is read back from its files."""
    bundle, pixels = with_residual, make_pixels(2, seed=3)
    engine = Engine(bundle, Settings())
    items = [
        {"op": "set", "layer": layer, "index": index, "value": 2, "dictionary": "residual"}
        for layer, index in ((0, 47), (1, 63))
    ]
    changes = resolved(bundle, *items, {"op": "project", "layer": 0, "index": 3, "dictionary": "residual"})
    found = engine.rerun.run(pixels.numpy(), [changes, changes])
    with torch.no_grad():
        expected = ResidualRerunGraph(graph, residual_export.saes)(
            pixels, *(torch.from_numpy(np.ascontiguousarray(part)) for part in stacked([changes, changes]).values())
        )
    for image, parts in enumerate(found):
        np.testing.assert_allclose(parts.embedding, expected[0][image], atol=1e-5)
        np.testing.assert_allclose(parts.components, expected[ALWAYS.index("components")][image], atol=1e-4)
    network = BundleNetwork(bundle)
    assert [network.features("residual", layer) for layer in range(3)] == [48, 64, 0]
    row = network.direction("residual", 1, 3, "encoder")
    np.testing.assert_allclose(row, residual_export.saes.encoders[1].weight[3], rtol=1e-6)
    with pytest.raises(InterventionError, match="no mean activations"):
        network.means("residual", 1, 3)
    assert verify(bundle.path).digest == bundle.digest


def test_images_of_a_batch_change_the_same_features(bundle):
    one, other = (resolved(bundle, {"op": "ablate", "layer": 0, "index": index}) for index in (1, 2))
    with pytest.raises(ValueError, match="the same indices"):
        stacked([one, other])


def test_components_come_with_details(engine, make_pixels):
    plain, detailed = engine.explain(make_pixels(2).numpy(), [False, True], [False, True])
    assert plain.details is None
    (alone,) = engine.explain(make_pixels(1).numpy())
    assert alone.components is None
    assert detailed.components.shape == (9, 32)
    assert detailed.details.head_components.shape == (3, 4, 32)
    assert engine.interventions == ["direct", "rerun"]


def test_a_bundle_says_what_interventions_have_to_know(bundle, clip, clt, make_pixels):
    network, images = BundleNetwork(bundle), make_pixels(4, seed=11)
    assert (network.layers, network.tokens, network.heads, network.width) == (3, 17, 4, 32)
    assert [network.features("clt", layer) for layer in (0, 2, 3)] == [64, 64, 0]
    assert network.features("residual", 0) == 0
    np.testing.assert_allclose(network.direction("clt", 1, 3, "decoder"), clt.directions()[1, 3], rtol=1e-6)
    np.testing.assert_allclose(network.direction("clt", 1, 3, "encoder"), clt.encoders[1].weight[3], rtol=1e-6)
    mean = mean_code(clip.tower, clt, [images])
    np.testing.assert_allclose(network.means("clt", 1, 3), mean[1, :, 3], atol=1e-6)
    taps = clip.tower(images)
    np.testing.assert_allclose(network.mean_stream(0)[1], taps.residual_in[:, 1:].mean((0, 1)), atol=1e-5)
    np.testing.assert_allclose(network.mean_stream(3)[0], taps.residual_out[:, 0].mean(0), atol=1e-4)


def test_what_a_bundle_lacks_is_said(bundle, tmp_path):
    def without(*names, **shape):
        copy = shutil.copytree(bundle.path, tmp_path / names[0])
        for name in names:
            (copy / name).unlink()
        manifest = bundle.manifest
        return seal(copy, manifest.model_copy(update={"shape": manifest.shape.model_copy(update=shape)}))

    imageless = without("baseline_activations.npy", "baseline_stream.npy")
    for item in SEVERAL[1:3]:
        with pytest.raises(InterventionError, match="exported without images"):
            resolved(imageless, item)
    older = without("rerun.onnx", heads=None)
    with pytest.raises(InterventionError, match="export it again"):
        BundleNetwork(older)
    assert verify(older.path).digest == older.digest
    assert Engine(older, Settings()).interventions == ["direct"]
    assert Engine(bundle, Settings(rerun=False)).interventions == ["direct"]


def test_a_graph_of_another_network_is_refused_on_first_use(bundle, tmp_path):
    copy = shutil.copytree(bundle.path, tmp_path / "other")
    shutil.copyfile(copy / "trace.onnx", copy / "rerun.onnx")
    engine = Engine(seal(copy, bundle.manifest), Settings())
    with pytest.raises(BundleError, match=r"rerun\.onnx"):
        engine.rerun.check()


def test_verify_notices_other_tensors(bundle, monkeypatch):
    run = RerunGraphs.run

    def shifted(self, pixels, changes):
        parts = run(self, pixels, changes)
        parts[0].rows[0] += 0.01
        return parts

    monkeypatch.setattr(RerunGraphs, "run", shifted)
    with pytest.raises(BundleError, match=r"rows of rerun\.onnx differ"):
        verify(bundle.path)
