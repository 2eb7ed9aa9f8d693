"""The survey against a brute-force one that keeps every activation of every image."""

import numpy as np
import pytest
import torch

from vitrine.training.cards import survey as module
from vitrine.training.cards.dictionary import CltFeatures, SaeFeatures
from vitrine.training.cards.survey import CLS, LOG_BINS, PATCHES, Survey, centres, histogram, quantiles

IMAGES, HELD_OUT, EXEMPLARS, CODES = 23, 9, 4, 10


def make_survey(clip, dictionary, pixels, sizes):
    """A survey of these pixels in batches of these sizes."""
    survey = Survey.empty(clip.tower, dictionary, IMAGES, HELD_OUT, EXEMPLARS, CODES)
    for batch in pixels.split(sizes):
        start = int(survey.seen)
        survey.add(clip.tower, dictionary, batch, torch.arange(start, start + len(batch)) % 7)
    return survey


@pytest.fixture(scope="module")
def pixels(make_pixels):
    return make_pixels(IMAGES + HELD_OUT, seed=5)


@pytest.fixture(scope="module")
def dense(clip, any_clt, pixels):
    """Every activation [N + H, L, T, F]."""
    taps = clip.tower(pixels)
    images, tokens = pixels.shape[0], clip.tower.tokens
    is_cls = torch.zeros(images, tokens, dtype=torch.bool)
    is_cls[:, 0] = True
    layers = []
    for code in any_clt.encode(taps.mlp_in.flatten(1, 2), is_cls.flatten()):
        empty = torch.zeros(images * tokens, any_clt.features)
        layers.append(empty.scatter(1, code.indices, code.values).view(images, tokens, -1))
    return torch.stack(layers, 1)


@pytest.fixture(scope="module")
def survey(clip, any_clt, pixels):
    return make_survey(clip, CltFeatures(any_clt), pixels, [5, 5, 5, 8, 9])


def strongest(dense, reading):
    """Signed activations by image [N, L, F], as a feature is read."""
    if reading == CLS:
        return dense[:IMAGES, :, 0]
    patches = dense[:IMAGES, :, 1:]
    return patches.gather(2, patches.abs().argmax(2, keepdim=True))[:, :, 0]


def test_counts(survey, dense):
    fires = dense[:IMAGES] != 0
    assert torch.equal(survey.fires[CLS], fires[:, :, 0].sum(0))
    assert torch.equal(survey.fires[PATCHES], fires[:, :, 1:].sum((0, 2)))
    assert int(survey.seen) == IMAGES + HELD_OUT
    assert fires[:, :, 0].any()
    assert survey.classes.tolist() == [image % 7 for image in range(IMAGES + HELD_OUT)]


@pytest.mark.parametrize("reading", [CLS, PATCHES])
def test_exemplars_are_the_strongest_images_with_their_masks(survey, dense, reading):
    values = strongest(dense, reading)
    best = values.abs().sort(dim=0, descending=True).values[:EXEMPLARS].permute(1, 2, 0)
    assert torch.allclose(survey.values[reading].abs(), best, atol=1e-6)
    for layer, feature, place in (survey.values[reading] != 0).nonzero().tolist():
        image = int(survey.images[reading, layer, feature, place])
        assert survey.values[reading, layer, feature, place] == pytest.approx(
            float(values[image, layer, feature]), abs=1e-5
        )
        mask = survey.masks[reading, layer, feature, place].float()
        assert torch.allclose(mask, dense[image, layer, 1:, feature].abs(), atol=2e-3)


def test_no_image_is_an_exemplar_twice(survey):
    images = survey.images.masked_fill(survey.values == 0, -1).flatten(0, 2).tolist()
    for row in images:
        used = [image for image in row if image >= 0]
        assert len(set(used)) == len(used)


def test_every_activation_is_counted_in_its_bin(survey, dense):
    for reading in (CLS, PATCHES):
        values = strongest(dense, reading).abs()
        assert torch.equal(survey.bins[reading].sum(-1), (values != 0).sum(0).int())
        layer, feature = divmod(int((values != 0).sum(0).flatten().argmax()), values.shape[-1])
        activations = values[:, layer, feature]
        estimates = quantiles(survey.bins[reading, layer, feature], (0.0, 0.5, 1.0))
        ends = [
            max(float(end), module.MIN_ACTIVATION) for end in (activations[activations > 0].min(), activations.max())
        ]
        assert estimates[[0, 2]].tolist() == pytest.approx(ends, rel=0.03)


def test_embeddings_and_codes(survey, clip, pixels, dense):
    expected = torch.nn.functional.normalize(clip.model.encode_image(pixels), dim=-1)
    assert torch.allclose(survey.embeddings, expected, atol=1e-5)
    codes = torch.zeros(CODES, *dense.shape[1::2])
    codes = codes.scatter_add(2, survey.code_indices.long(), survey.code_values.float())
    assert torch.allclose(codes, dense[:CODES, :, 0], atol=2e-3)


@pytest.mark.parametrize("sparsifier", ["relu_topk", "jumprelu"])
def test_features_of_residual_saes(clip, make_saes, pixels, sparsifier):
    """Of the stream after each block but the last, by blocks that run one after the other; F differs by layer."""
    saes = make_saes(clip, k=8, k_cls=5, sparsifier=sparsifier)
    survey = make_survey(clip, SaeFeatures(saes), pixels, [5, 5, 5, 8, 9])
    stream, is_cls = clip.tower.embed(pixels), torch.zeros(len(pixels), clip.tower.tokens, dtype=torch.bool)
    is_cls[:, 0] = True
    for layer, (count, encoder) in enumerate(zip((48, 64), saes.encoders, strict=True)):
        stream = clip.tower.blocks[layer](stream)
        tokens = stream.flatten(0, 1).double()
        read = (tokens - tokens.mean(1, keepdim=True)) / (tokens.std(1, keepdim=True) + 1e-5)
        code = encoder.encode_dense(read.float(), is_cls.flatten())
        dense = torch.zeros(len(tokens), 64).scatter(1, code.indices, code.values).unflatten(0, stream.shape[:2])
        assert torch.equal(survey.fires[CLS, layer], (dense[:IMAGES, 0] != 0).sum(0))
        assert torch.equal(survey.fires[PATCHES, layer], (dense[:IMAGES, 1:] != 0).sum((0, 1)))
        assert torch.allclose(survey.values[CLS, layer, :, 0], dense[:IMAGES, 0].amax(0), atol=1e-4)
        assert torch.allclose(survey.values[PATCHES, layer, :, 0], dense[:IMAGES, 1:].amax((0, 1)), atol=1e-4)
        fires = survey.fires_at(layer, torch.full((64,), PATCHES), held_out=True)
        assert torch.equal(fires, (dense[IMAGES:, 1:] != 0).any(1))
        kept = torch.zeros(CODES, 64)
        kept.scatter_add_(1, survey.code_indices[:, layer].long(), survey.code_values[:, layer].float())
        assert torch.allclose(kept, dense[:CODES, 0], atol=2e-3)
        assert survey.fires[:, layer, :count].any()
        assert not survey.fires[:, layer, count:].any()


@pytest.mark.parametrize("held_out", [False, True])
def test_what_fires_in_the_first_images_and_in_the_held_out_ones(survey, dense, held_out):
    """Every feature at its own reading."""
    fires = (dense[IMAGES:] if held_out else dense[:CODES]) != 0
    reading = torch.arange(dense.shape[-1]) % 2
    for layer in range(dense.shape[1]):
        found = survey.fires_at(layer, reading, held_out)
        assert torch.equal(found[:, reading == CLS], fires[:, layer, 0][:, reading == CLS])
        assert torch.equal(found[:, reading == PATCHES], fires[:, layer, 1:].any(1)[:, reading == PATCHES])
        assert found[:, reading == CLS].any()


def test_a_resumed_survey_equals_an_uninterrupted_one(clip, clt, pixels, tmp_path):
    dictionary = CltFeatures(clt)
    whole = make_survey(clip, dictionary, pixels, [5, 5, 5, 8, 9])
    half = Survey.empty(clip.tower, dictionary, IMAGES, HELD_OUT, EXEMPLARS, CODES)
    for batch, classes in ((pixels[:5], torch.arange(5)), (pixels[5:10], torch.arange(5, 10) % 7)):
        half.add(clip.tower, dictionary, batch, classes)
    half.save(tmp_path / "state", "mine")
    assert Survey.load(tmp_path / "state", "another's") is None
    assert Survey.load(tmp_path / "nothing", "mine") is None
    resumed = Survey.load(tmp_path / "state", "mine")
    for start, end in ((10, 15), (15, 23), (23, 32)):
        resumed.add(clip.tower, dictionary, pixels[start:end], torch.arange(start, end) % 7)
    for name, tensor in vars(whole).items():
        assert torch.equal(tensor, getattr(resumed, name)), name


def test_features_beyond_a_multiple_of_eight(clip, clt):
    """F = 64 fills its bytes; 61 does not."""
    survey = Survey.empty(clip.tower, CltFeatures(clt), IMAGES, HELD_OUT, EXEMPLARS, CODES)
    dense = torch.zeros(HELD_OUT, clip.tower.tokens, 61)
    dense[2, 0, 60] = dense[3, 5, 7] = 1.0
    survey._pack(survey.fired_held_out[:, :, 1], dense)
    for reading, fires in ((CLS, [2, 60]), (PATCHES, [3, 7])):
        assert survey.fires_at(1, torch.full((61,), reading), held_out=True).nonzero().tolist() == [fires]


def test_a_histogram_of_equal_widths():
    bins = torch.zeros(2, LOG_BINS, dtype=torch.int32)
    values = np.array([0.3, 1.1, 1.1, 3.9])
    for value in values:
        bins[0, int(np.floor(np.log2(value / module.MIN_ACTIVATION) * module.BINS_PER_OCTAVE))] += 1
    counts = histogram(bins, torch.tensor([4.0, 0.0]), 4)
    assert counts.tolist() == [[1, 2, 0, 1], [0, 0, 0, 0]]
    assert torch.isnan(quantiles(bins, (0.5,))[1])
    assert quantiles(bins, (0.5,))[0].item() == pytest.approx(1.1, rel=0.03)


def test_bins_are_of_equal_ratio():
    ratios = centres()[1:] / centres()[:-1]
    assert torch.allclose(ratios, torch.tensor(2 ** (1 / 16), dtype=torch.float64))
    assert float(centres()[0]) == pytest.approx(2**-8 * 2 ** (1 / 32))
