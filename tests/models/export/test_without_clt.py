"""A CLIP without a CLT: its rows against float64, the bundle, its source accounts and interventions."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from pydantic import ValidationError

from vitrine.models.account.ledger import Decomposition, drop_effects, feature_contributions, ledger
from vitrine.models.account.sources import Trace, accounts
from vitrine.models.bundle.layout import (
    ALWAYS,
    DETAILS_INPUT,
    EVERY_OUTPUT,
    ON_REQUEST,
    SOURCES_OUTPUTS,
    STARTS,
    TRACE_OUTPUTS,
    given,
)
from vitrine.models.bundle.manifest import Manifest, Metrics
from vitrine.models.clip.tower import Tower
from vitrine.models.export.export import export_bundle
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.vision import VisionGraph
from vitrine.models.interventions import direct
from vitrine.models.interventions.batch import stacked
from vitrine.models.interventions.changes import InterventionError, resolve
from vitrine.models.interventions.network import BundleNetwork
from vitrine.models.interventions.spec import Intervention

IMAGES = 2


def taps_of(tower, pixels):
    """In float64, of [CLS]: prior [B, d], what attention and the MLPs wrote [L, B, d], residual [B, d]; the tower."""
    exact = Tower(deepcopy(tower.visual).double())
    with torch.no_grad():
        taps = exact(pixels.double())
    return exact, *(tap[..., 0, :] for tap in (taps.residual_in, taps.attn_out, taps.mlp_out, taps.residual_out))


def in_embedding(tower, residual, component):
    """A component [..., d] of residuals [B, d] as a row [..., D] of the unit embedding."""
    ln = tower.visual.ln_post
    sigma = (residual.var(-1, correction=0, keepdim=True) + ln.eps).sqrt()
    scale = sigma * tower.head(residual).norm(dim=-1, keepdim=True)
    return (((component - component.mean(-1, keepdim=True)) * ln.weight) @ tower.visual.proj / scale).detach().numpy()


def test_every_row_is_what_that_part_wrote(any_clip, make_pixels):
    pixels = make_pixels(IMAGES, any_clip.tower.image_size)
    graph = VisionGraph(any_clip.tower).eval()
    with torch.no_grad():
        outputs = dict(zip((*graph.always, *ON_REQUEST), map(np.asarray, graph(pixels)), strict=True))
        expected_embedding = any_clip.model.encode_image(pixels, normalize=True).numpy()
    tower, prior, attention, mlp, residual = taps_of(any_clip.tower, pixels)
    rows = outputs["rows"]
    layers = tower.layers
    np.testing.assert_allclose(outputs["embedding"], expected_embedding, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows.sum(1), expected_embedding, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows[:, 0], in_embedding(tower, residual, prior), rtol=0, atol=1e-5)
    for layer in range(layers):
        of_attention, of_mlp = (in_embedding(tower, residual, part[layer]) for part in (attention, mlp))
        np.testing.assert_allclose(rows[:, 1 + layer], of_attention, rtol=0, atol=1e-5)
        np.testing.assert_allclose(rows[:, 1 + layers + layer], of_mlp, rtol=0, atol=1e-5)
    assert np.abs(rows[:, -1]).max() == 0  # there is no error of a CLT
    assert np.abs(rows[:, 1 + layers : 1 + 2 * layers]).max() > 0.01


def test_with_a_clt_the_mlps_rows_are_those_of_features_error_and_decoder_biases(any_clip, make_clt, make_pixels):
    pixels = make_pixels(IMAGES, any_clip.tower.image_size)
    graph = AttributionGraph(any_clip.tower, make_clt(any_clip), torch.zeros(3, 32), torch.float32).eval()
    with torch.no_grad():
        outputs = dict(zip(EVERY_OUTPUT, map(np.asarray, graph(pixels)), strict=True))
    tower, _, _, mlp, residual = taps_of(any_clip.tower, pixels)
    for layer in range(3):
        expected = in_embedding(tower, residual, mlp[layer])
        np.testing.assert_allclose(outputs["mlp_rows"][:, layer], expected, rtol=0, atol=1e-5)
    rows, beta = outputs["rows"], np.asarray(graph.beta) / outputs["norm"][:, None]
    written = rows[:, 4:7].sum(1) + (rows[:, 7] - beta) + rows[:, 8]
    np.testing.assert_allclose(outputs["mlp_rows"].sum(1), written, rtol=0, atol=1e-5)
    part, label = Decomposition.from_batch(outputs, 0), outputs["embedding"][1]
    book = ledger(part, label, 10.0)
    expected = 10 * (outputs["mlp_rows"][0].astype(np.float64) @ label.astype(np.float64))
    np.testing.assert_allclose(book.mlp, expected, atol=1e-12)
    np.testing.assert_array_equal(book.clt, book.by_layer)


def run(session, names, feeds):
    return dict(zip(names, session.run(names, feeds), strict=True))


def session(bundle, file):
    return onnxruntime.InferenceSession(bundle.path / file, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def parts(plain_bundle, make_pixels):
    """Of two images, by the bundle's vision graph, with all that it gives."""
    feeds = {"pixels": make_pixels(IMAGES).numpy(), DETAILS_INPUT: np.array(True)}
    outputs = run(session(plain_bundle, "vision.onnx"), given(EVERY_OUTPUT, features=False), feeds)
    return [Decomposition.from_batch(outputs, image, with_details=True) for image in range(IMAGES)]


@pytest.fixture(scope="module")
def labels(clip):
    return clip.encode_labels(["a cat", "a dog", "the sea"], ["{}"]).numpy()


def test_the_bundle_says_that_it_has_no_features(plain_bundle):
    manifest = plain_bundle.manifest
    assert not manifest.has_features
    assert (manifest.shape.features, manifest.shape.k, manifest.sparsifier, manifest.data) == (0, 0, None, None)
    assert manifest.features_of("clt") == ()
    assert plain_bundle.directions.shape == (3, 0, 32)
    assert plain_bundle.encoders is None
    assert plain_bundle.cards is None
    assert not {"directions.npy", "encoders.npy", "replacement.onnx"} & manifest.files.keys()
    card = (plain_bundle.path / "MODEL_CARD.md").read_text()
    assert "**CLT**: none" in card
    assert "Sparsifier" not in card
    assert "Trained on" not in card


def test_its_ledger_adds_up_by_the_mlps(plain_bundle, parts, labels, clip, make_pixels):
    plain = clip.model.encode_image(make_pixels(IMAGES), normalize=True).numpy()
    scale = plain_bundle.manifest.logit_scale
    for part, embedding in zip(parts, plain, strict=True):
        book = ledger(part, labels[0], scale)
        assert book.logit == pytest.approx(scale * float(embedding @ labels[0]), abs=1e-4)
        assert len(book.clt) == 0
        assert book.error == 0
        total = book.prior + book.attention.sum() + book.mlp.sum() + book.bias + book.remainder
        assert total == pytest.approx(book.logit, abs=1e-9)
        assert abs(book.remainder) < 1e-4
        single = abs(book.prior) + abs(book.bias)
        assert book.gross == pytest.approx(single + np.abs(book.attention).sum() + np.abs(book.mlp).sum())
        assert feature_contributions(part, plain_bundle.directions, plain_bundle.fold, labels[0], scale).shape == (3, 0)
        assert np.abs(drop_effects(part, labels, 0, plain_bundle.beta, scale)).max() > 0


def test_its_source_accounts_add_up_by_the_mlps_outputs(plain_bundle, parts, labels, make_pixels):
    scale = plain_bundle.manifest.logit_scale
    names = given(TRACE_OUTPUTS, features=False)
    outputs = run(session(plain_bundle, "trace.onnx"), names, {"pixels": make_pixels(IMAGES).numpy()})
    trace = Trace.from_batch(outputs, 0)
    np.testing.assert_allclose(trace.embedding, parts[0].embedding, atol=1e-5)
    zeros = np.zeros(len(labels), np.int64)
    starts = trace.starts(labels, plain_bundle.fold, scale).astype(np.float32)
    feeds = dict(zip(STARTS, (starts, zeros + 3, zeros, zeros), strict=True))
    feeds |= {name: outputs[name][0] for name in names[3:]}
    found = run(session(plain_bundle, "sources.onnx"), given(SOURCES_OUTPUTS, features=False), feeds)
    for account in accounts(trace, found, labels, plain_bundle.beta, scale):
        assert abs(account.remainder) < 1e-4
        assert account.features.shape == (3, trace.written.shape[1], 0)
        assert np.abs(account.errors.sum(1)).min() > 1e-4


def test_an_mlp_is_taken_out_directly_as_its_row_is(plain_bundle, parts):
    changes = resolve([Intervention(op="ablate", layer=1, row="mlp")], BundleNetwork(plain_bundle), "direct")
    after = direct.changed(parts[0], changes, plain_bundle)
    expected = parts[0].without(np.array([parts[0].clt_row(1)]), plain_bundle.beta)[0]
    np.testing.assert_allclose(after.embedding, expected, atol=1e-5)
    np.testing.assert_allclose(after.rows.sum(0), after.embedding, atol=1e-5)


def test_the_network_runs_without_an_mlp_or_a_head(plain_bundle, clip, make_pixels):
    pixels, network = make_pixels(1), BundleNetwork(plain_bundle)
    graph, names = session(plain_bundle, "rerun.onnx"), given(ALWAYS, features=False)
    found = {}
    for name, items in {
        "nothing": [],
        "mlp": [Intervention(op="ablate", layer=1, row="mlp", tokens="all")],
        "head": [Intervention(op="ablate", layer=0, head=1, tokens="all")],
    }.items():
        changes = resolve(items, network, "rerun")
        outputs = run(graph, names, {"pixels": pixels.numpy()} | stacked([changes]))
        found[name] = outputs["embedding"][0]
        np.testing.assert_allclose(outputs["rows"][0].sum(0), found[name], atol=1e-5)
    visual = deepcopy(clip.model.visual)
    unit = torch.nn.functional.normalize
    with torch.no_grad():
        plain = unit(visual(pixels), dim=-1).numpy()[0]
        block = visual.transformer.resblocks[1]
        block.mlp.c_proj.weight.zero_(), block.mlp.c_proj.bias.zero_()
        without = unit(visual(pixels), dim=-1).numpy()[0]
    np.testing.assert_allclose(found["nothing"], plain, atol=1e-5)
    np.testing.assert_allclose(found["mlp"], without, atol=1e-5)
    assert np.abs(without - plain).max() > 1e-3
    assert np.abs(found["head"] - plain).max() > 1e-3


@pytest.mark.parametrize(
    ("item", "mode"),
    [
        (Intervention(op="ablate", layer=0, index=3), "rerun"),
        (Intervention(op="project", layer=0, index=3), "direct"),
        (Intervention(op="ablate", layer=0, row="clt"), "direct"),
        (Intervention(op="scale", layer=0, row="clt", value=2), "rerun"),
        (Intervention(op="ablate", row="error"), "direct"),
    ],
)
def test_interventions_on_features_are_refused_by_name(plain_bundle, item, mode):
    with pytest.raises(InterventionError, match=r"this bundle has no CLT.*vitrine train"):
        resolve([item], BundleNetwork(plain_bundle), mode)


@pytest.mark.usefixtures("remembered_conversions")
def test_a_variant_is_checked_by_labels_and_rows(clip, provenance, make_pixels, tmp_path):
    of_none = replace(provenance, data=None, recipe="", metrics=Metrics())
    images = [make_pixels(8, seed=3)]
    found = export_bundle(clip, None, None, of_none, tmp_path / "out", variants=("fp16",), calibration=images)
    agreement = found.manifest.agreement["fp16"]
    assert (agreement.images, agreement.top_features) == (8, None)
    assert agreement.ledger_cosine > 0.99
    assert agreement.is_sufficient
    assert "top features" not in agreement.beside_the_least


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("sparsifier", "relu_topk", "sparsifier describes the CLT's features: it is given, but there are no features"),
        ("cards", "those of carded", "cards are given, but there is no CLT"),
    ],
)
def test_a_manifest_has_nothing_of_a_clt_that_there_is_not(plain_bundle, carded, field, value, problem):
    value = carded.manifest.cards.model_dump() if field == "cards" else value
    with pytest.raises(ValidationError, match=problem):
        Manifest.model_validate(plain_bundle.manifest.model_dump() | {field: value})


def test_a_manifest_lacks_nothing_of_the_clt_that_there_is(bundle):
    fields = bundle.manifest.model_dump()
    for name in ("sparsifier", "data"):
        with pytest.raises(ValidationError, match=f"{name} describes the CLT's features: it is missing"):
            Manifest.model_validate(fields | {name: None})
    with pytest.raises(ValidationError, match="without a CLT both must be 0"):
        Manifest.model_validate(fields | {"shape": fields["shape"] | {"features": 0}})
