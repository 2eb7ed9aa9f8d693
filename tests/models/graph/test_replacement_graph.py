"""The replacement graph against the replacement model and against the definition of C_{i->j}."""

import shutil
from copy import deepcopy

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from common import with_stored_decoders
from vitrine.models.account.windows import TOKENS, replacement_mask
from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.layout import REPLACED_INPUT, REPLACEMENT_OUTPUTS
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.replacement import Replacement
from vitrine.models.export.export import export_bundle
from vitrine.models.export.parity import check_replacement
from vitrine.models.graph.onnx_file import ExportError
from vitrine.models.graph.replacement import ReplacementGraph

IMAGES = 3


@pytest.fixture(scope="module")
def bytes_clt(any_clt):
    """`any_clt` in float64, its decoders as the graph stores them."""
    return with_stored_decoders(any_clt)


@pytest.fixture(scope="module")
def model(clip, bytes_clt):
    return Replacement(Tower(deepcopy(clip.model).double().visual), bytes_clt)


def expected_scores(clt, codes):
    """C of every image by the paper's formula [IMAGES, 2, L, L], for codes of all tokens."""
    layers, tokens = clt.layers, len(codes[0].values) // IMAGES
    scores = torch.zeros(IMAGES, 2, layers, layers, dtype=torch.float64)
    for target, decoder in enumerate(clt.decoders):
        parts = decoder.contributions(codes).unflatten(1, (IMAGES, tokens))
        for image in range(IMAGES):
            token_scores = []
            for token in range(tokens):
                y = parts[:, image, token].sum(0)
                token_scores.append(None if not y.any() else parts[:, image, token] @ y / (y @ y))
            columns = list(decoder.sources)
            if token_scores[0] is not None:
                scores[image, 0, target, columns] = token_scores[0]
            if scored := [score for score in token_scores[1:] if score is not None]:
                scores[image, 1, target, columns] = torch.stack(scored).mean(0)
    return scores


def test_scores_and_embedding_of_clip_itself(clip, any_clt, bytes_clt, model, make_pixels):
    pixels = make_pixels(IMAGES, seed=8)
    embedding, scores = ReplacementGraph(clip.tower, any_clt, torch.float32)(pixels, torch.zeros(3, 2).bool())
    torch.testing.assert_close(embedding, clip.model.encode_image(pixels, normalize=True), rtol=0, atol=1e-5)
    mlp_in = model.tower(pixels.double()).mlp_in
    is_cls = (torch.arange(mlp_in[0, ..., 0].numel()) % clip.tower.tokens) == 0
    expected = expected_scores(bytes_clt, bytes_clt.encode(mlp_in.flatten(1, 2), is_cls))
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-4)
    sums = scores.sum(-1)
    assert (((sums - 1).abs() < 1e-5) | (sums == 0)).all()
    assert (sums > 0.5).double().mean() > 0.8
    if any_clt.architecture.cross_layer:
        assert (scores[:, :, 2].abs() > 1e-3).all(-1).any()
    assert not scores.triu(1).any()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("window", [range(3), range(1, 3), range(1, 2)])
def test_replacement_of_any_window_and_token_type(clip, any_clt, model, make_pixels, window, tokens):
    pixels = make_pixels(IMAGES, seed=8)
    graph = ReplacementGraph(clip.tower, any_clt, torch.float32)
    mask = torch.from_numpy(replacement_mask(3, window, tokens))
    embedding, scores = graph(pixels, mask)
    residual = model(pixels.double(), window, tokens).residual
    expected = F.normalize(model.tower.head(residual[:, 0]), dim=-1)
    torch.testing.assert_close(embedding.double(), expected, rtol=0, atol=1e-4)
    plain, _ = graph(pixels, torch.zeros(3, 2).bool())
    moved = (embedding - plain).abs().amax(-1)
    assert (moved > 1e-3).all() or (tokens == "patches" and window[0] == 2)
    sums = scores.sum(-1)
    assert (((sums - 1).abs() < 1e-5) | (sums == 0)).all()


@pytest.mark.parametrize("roundings", [-4, 0, 4])
def test_patches_to_which_nothing_is_written_are_left_out_of_the_mean(clip, clt, make_pixels, roundings):
    """Half of the patches have no active feature: only the others count.

    One pre-activation ties with 0, or misses it by a few roundings, as it does on other CPUs.
    """
    silent = deepcopy(clt)
    pixels = make_pixels(IMAGES, seed=8)
    preactivations = silent.encoders[0].weight @ clip.tower(pixels).mlp_in[0].flatten(0, 1).T
    bias = -preactivations.amax(0).median()
    for _ in range(abs(roundings)):
        bias = torch.nextafter(bias, torch.tensor(roundings * torch.inf))
    silent.encoders[0].bias.fill_(bias)
    graph = ReplacementGraph(clip.tower, silent, torch.float32)
    codes = silent.encoders[0](clip.tower(pixels).mlp_in[0].flatten(0, 1), torch.zeros(IMAGES * 17).bool())
    active = (codes.values > 0).any(-1).view(IMAGES, 17)[:, 1:]
    assert 0.2 < active.double().mean() < 0.8
    assert active.any(1).all()
    _, scores = graph(pixels, torch.zeros(3, 2).bool())
    torch.testing.assert_close(scores[:, 1, 0, 0], torch.ones(IMAGES))


def test_exported_graph_is_the_torch_module(bundle, clip, clt, make_pixels):
    assert bundle.has_replacement
    session = onnxruntime.InferenceSession(bundle.path / "replacement.onnx")
    graph, mask = ReplacementGraph(clip.tower, clt, torch.float32), torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    for batch in (1, 4):
        pixels = make_pixels(batch, seed=batch)
        outputs = session.run(REPLACEMENT_OUTPUTS, {"pixels": pixels.numpy(), REPLACED_INPUT: mask.numpy()})
        for ours, theirs in zip(outputs, graph(pixels, mask), strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)


def test_weights_that_vision_has_are_not_stored_again(bundle):
    """CLIP's weights are in vision.onnx.data. New are the encoders (of which that file has only bytes), the decoders (a
    byte a number, and their scales), and the last block's queries, keys and values (which are separate there)."""
    size = (bundle.path / "replacement.onnx.data").stat().st_size
    new = 6 * 64 * (32 + 4) + 3 * 64 * 32 * 4
    assert new < size < new + 3 * 32 * 32 * 4 + 4096  # plus the format's alignment


def test_bundle_without_it(export_variant):
    _, bundle = export_variant("relu_topk")
    assert not bundle.has_replacement
    assert not (bundle.path / "replacement.onnx").exists()


def test_replacement_is_part_of_what_is_checked(bundle, tmp_path):
    shutil.copytree(bundle.path, tmp_path / "bundle")
    (tmp_path / "bundle" / "replacement.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"replacement\.onnx\.data is missing"):
        open_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("what", ["embedding", "contributions"])
def test_file_that_differs_from_torch_is_refused(bundle, clip, clt, monkeypatch, what):
    graph = ReplacementGraph(clip.tower, clt, torch.float32).eval()
    check_replacement(clip, graph, bundle.path / "replacement.onnx")
    original = ReplacementGraph.forward

    def other(self, pixels, mask):
        embedding, scores = original(self, pixels, mask)
        return (embedding + mask.any() * 0.01, scores) if what == "embedding" else (embedding, scores + 0.01)

    monkeypatch.setattr(ReplacementGraph, "forward", other)
    with pytest.raises(ExportError, match=f"{what} under replacement: relative difference"):
        check_replacement(clip, graph, bundle.path / "replacement.onnx")


def test_export_fails_where_the_file_differs(clip, clt, cls_mean, provenance, tmp_path, monkeypatch):
    original = ReplacementGraph.forward

    def wrong(self, pixels, mask):
        embedding, scores = original(self, pixels, mask)
        return embedding, scores + 0.01 * torch.compiler.is_exporting()

    monkeypatch.setattr(ReplacementGraph, "forward", wrong)
    with pytest.raises(ExportError, match="contributions under replacement: relative difference"):
        export_bundle(clip, clt, cls_mean, provenance, tmp_path / "out", replacement=True)
    assert not (tmp_path / "out").exists()
