"""The fused graph and the ledger against explanations.md's formulas, component by component, in float64."""

from copy import deepcopy
from dataclasses import astuple, dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vitrine.models.account.ledger import (
    Decomposition,
    Details,
    drop_effects,
    feature_contributions,
    ledger,
    logits,
    probabilities,
)
from vitrine.models.bundle.layout import EVERY_OUTPUT, ON_REQUEST
from vitrine.models.clip.tower import Tower
from vitrine.models.graph.attribution import AttributionGraph

IMAGES = 3


@dataclass
class Reference:
    """Expected values for one image, in float64, computed from the tower's taps and the CLT's weights."""

    components: Tensor  # [R, d], in the ledger's order
    codes: Tensor  # [L, F]
    onto_last: Tensor  # [L, d] what each source layer writes to the last MLP output
    mlp: Tensor  # [d] sum of the true MLP outputs

    @property
    def residual(self):
        return self.components.sum(0)


@pytest.fixture(scope="module")
def tower(clip):
    return Tower(deepcopy(clip.model).double().visual)


@pytest.fixture(scope="module")
def references(tower, clt, make_pixels):
    taps = tower(make_pixels(IMAGES).double())
    return [_reference(tower.layers, clt, *(tap[..., image, 0, :] for tap in taps)) for image in range(IMAGES)]


def _reference(layers, clt, residual_in, mlp_in, attn_out, mlp_out, residual_out):
    codes = torch.zeros(layers, clt.features, dtype=torch.float64)
    for layer, encoder in enumerate(clt.encoders):
        preactivations = encoder.weight.double() @ mlp_in[layer] + encoder.bias.double()
        best = preactivations.argsort()[-clt.architecture.k_cls[layer] :]
        codes[layer, best] = preactivations[best].relu()
    written = {(i, j): codes[i] @ clt.decoders[j].weights[i].double() for j in range(layers) for i in range(j + 1)}
    sources = [sum(written[i, j] for j in range(i, layers)) for i in range(layers)]
    bias, mlp = sum(decoder.bias.double() for decoder in clt.decoders), mlp_out.sum(0)
    components = torch.stack([residual_in, *attn_out, *sources, bias, mlp - sum(sources) - bias])
    torch.testing.assert_close(components.sum(0), residual_out)
    return Reference(components, codes, torch.stack([written[i, layers - 1] for i in range(layers)]), mlp)


def decompositions(graph, pixels):
    """`graph`'s decomposition of each image."""
    outputs = dict(zip(EVERY_OUTPUT, (output.numpy() for output in graph(pixels)), strict=True))
    details, fidelity = {name: outputs.pop(name) for name in ON_REQUEST}, outputs.pop("fidelity")
    return [
        Decomposition(
            **{name: value[image] for name, value in outputs.items()},
            details=Details(**{name: value[image] for name, value in details.items()}),
            r2=fidelity[image, 0],
            cosine=fidelity[image, 1],
        )
        for image in range(len(pixels))
    ]


@pytest.fixture(scope="module")
def parts(graph, make_pixels):
    return decompositions(graph, make_pixels(IMAGES))


@pytest.fixture(scope="module")
def labels(clip):
    return clip.encode_labels(["a cat", "a dog", "a house", "the sea"], ["{}"]).numpy()


def ledger_rows(ledger):
    """The rows of a ledger [R], in order: between the logit and the remainder."""
    return np.concatenate([np.atleast_1d(part) for part in astuple(ledger)[1:6]])


def test_every_row_is_that_of_the_formulas(tower, references, parts, labels, clip):
    ln, projection, s = tower.visual.ln_post, tower.visual.proj, clip.logit_scale
    for reference, part in zip(references, parts, strict=True):
        sigma = (reference.residual.var(correction=0) + ln.eps).sqrt()
        norm = tower.head(reference.residual).norm()
        for label in labels:
            t = torch.from_numpy(label).double()
            expected = [
                s / (sigma * norm) * t @ projection.T @ (ln.weight * (c - c.mean())) for c in reference.components
            ]
            expected[-2] += s / norm * t @ projection.T @ ln.bias
            np.testing.assert_allclose(ledger_rows(ledger(part, label, s)), torch.stack(expected), rtol=0, atol=1e-4)


def test_rows_add_up_to_the_logit_of_plain_clip(parts, labels, clip, make_pixels):
    plain = clip.model.encode_image(make_pixels(IMAGES), normalize=True).numpy()
    for embedding, part in zip(plain, parts, strict=True):
        for label in labels:
            result = ledger(part, label, clip.logit_scale)
            assert result.logit == pytest.approx(clip.logit_scale * float(embedding @ label), abs=1e-4)
            assert ledger_rows(result).sum() == pytest.approx(result.logit - result.remainder, abs=1e-12)
            assert abs(result.remainder) < 1e-4


def test_any_supported_tower_has_an_exact_ledger(any_clip, make_clt, make_pixels):
    pixels = make_pixels(2, any_clip.tower.image_size)
    graph = AttributionGraph(any_clip.tower, make_clt(any_clip), torch.zeros(3, 32), torch.float32)
    for part, embedding in zip(decompositions(graph, pixels), any_clip.model.encode_image(pixels), strict=True):
        unit = (embedding / embedding.norm()).numpy()
        np.testing.assert_allclose(part.rows.sum(0), unit, rtol=0, atol=1e-5)
        np.testing.assert_allclose(part.embedding, unit, rtol=0, atol=1e-5)


def test_rows_do_not_depend_on_the_other_images_of_a_batch(graph, parts, make_pixels):
    (alone,) = decompositions(graph, make_pixels(IMAGES)[1:2])
    np.testing.assert_allclose(alone.rows, parts[1].rows, rtol=0, atol=1e-5)


def test_prior_and_bias_differ_between_images_only_by_sigma_and_norm(parts):
    """Their components are constants of the model."""
    first, second = (part.rows[0] * part.sigma * part.norm for part in parts[:2])
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


def test_contrast_is_the_difference_of_two_ledgers(parts, labels, clip):
    for part in parts:
        a, b = (ledger(part, label, clip.logit_scale) for label in labels[:2])
        contrast = ledger(part, labels[0] - labels[1], clip.logit_scale)
        np.testing.assert_allclose(ledger_rows(contrast), ledger_rows(a) - ledger_rows(b), rtol=0, atol=1e-5)
        assert contrast.logit == pytest.approx(a.logit - b.logit, abs=1e-5)


def test_codes_are_those_of_the_clt(references, parts):
    for reference, part in zip(references, parts, strict=True):
        dense = np.zeros(reference.codes.shape)
        np.put_along_axis(dense, part.feature_indices, part.feature_values, axis=1)
        np.testing.assert_allclose(dense, reference.codes, rtol=0, atol=1e-4)


def test_feature_contributions_add_up_to_the_rows_of_their_layers(bundle, parts, labels, clip):
    for part in parts:
        result = feature_contributions(part, bundle.directions, bundle.fold, labels[0], clip.logit_scale)
        np.testing.assert_allclose(result.sum(1), ledger(part, labels[0], clip.logit_scale).clt, rtol=0, atol=1e-4)


def test_each_feature_contributes_what_its_decoders_write(bundle, clt, tower, references, parts, labels, clip):
    ln, t = tower.visual.ln_post, torch.from_numpy(labels[0]).double()
    for reference, part in zip(references, parts, strict=True):
        contributions = feature_contributions(part, bundle.directions, bundle.fold, labels[0], clip.logit_scale)
        sigma = (reference.residual.var(correction=0) + ln.eps).sqrt()
        norm = tower.head(reference.residual).norm()
        for layer, place in np.ndindex(contributions.shape):
            feature = part.feature_indices[layer, place]
            direction = sum(decoder.weights[layer][feature].double() for decoder in clt.decoders[layer:])
            c = reference.codes[layer, feature] * direction
            expected = clip.logit_scale / (sigma * norm) * t @ tower.visual.proj.T @ (ln.weight * (c - c.mean()))
            assert contributions[layer, place] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("row", range(9))
def test_removing_a_row_is_recomputing_the_head_without_its_component(bundle, tower, references, parts, row):
    for reference, part in zip(references, parts, strict=True):
        remaining = tower.head(reference.residual - reference.components[row])
        (embedding,) = part.without(np.array([row]), bundle.beta)
        np.testing.assert_allclose(embedding, remaining / remaining.norm(), rtol=0, atol=1e-5)


def test_drop_effects_are_those_of_the_recomputed_prediction(bundle, tower, references, parts, labels, clip):
    def prediction(residual):
        embedding = tower.head(residual)
        return (clip.logit_scale * torch.from_numpy(labels).double() @ (embedding / embedding.norm())).softmax(0)

    largest = 0
    for reference, part in zip(references, parts, strict=True):
        for target in range(len(labels)):
            before = prediction(reference.residual)[target]
            expected = [prediction(reference.residual - c)[target] - before for c in reference.components[4:7]]
            effects = drop_effects(part, labels, target, bundle.beta, clip.logit_scale)
            np.testing.assert_allclose(effects, expected, rtol=0, atol=1e-5)
            largest = max(largest, np.abs(effects).max())
    assert largest > 0.01  # otherwise this test shows nothing


def test_projection_is_the_papers_score_on_the_last_target(references, parts):
    for reference, part in zip(references, parts, strict=True):
        last = reference.onto_last.sum(0)
        np.testing.assert_allclose(part.projection, reference.onto_last @ last / (last @ last), rtol=0, atol=1e-5)
        assert part.projection.sum() == pytest.approx(1, abs=1e-5)


def test_fidelity_is_that_of_what_the_mlps_add_to_the_embedding(tower, clt, cls_mean, references, parts):
    def folded(component):
        return (tower.visual.ln_post.weight * (component - component.mean())) @ tower.visual.proj

    mean = folded(cls_mean.double().sum(0))
    for reference, part in zip(references, parts, strict=True):
        truth, approximation = folded(reference.mlp), folded(reference.components[4:8].sum(0))
        r2 = 1 - (truth - approximation).square().sum() / (truth - mean).square().sum()
        assert part.r2 == pytest.approx(float(r2), rel=1e-4)
        assert part.cosine == pytest.approx(float(cosine_similarity(truth, approximation, dim=0)), abs=1e-4)


@pytest.fixture
def by_hand():
    """One layer, two features, an embedding of two dimensions."""
    return Decomposition(
        embedding=np.array([0.6, 0.8]),
        rows=np.array([[0.1, 0.0], [0.2, 0.3], [0.4, -0.1], [-0.1, 0.2], [0.0, 0.4]]),
        sigma=2.0,
        sigma_without=np.array([9.0, 9.0, 1.0, 9.0, 9.0]),
        norm=4.0,
        feature_indices=np.array([[1, 0]]),
        feature_values=np.array([[0.5, 0.0]]),
        projection=np.array([1.0]),
        r2=0.9,
        cosine=0.95,
    )


def test_ledger_by_hand(by_hand):
    result = ledger(by_hand, np.array([1.0, 0.0]), 10)
    np.testing.assert_allclose(ledger_rows(result), [1, 2, 4, -1, 0], atol=1e-12)
    assert (result.logit, result.remainder, result.gross) == pytest.approx((6, 0, 8))


def test_contrast_by_hand(by_hand):
    result = ledger(by_hand, np.array([1.0, -1.0]), 10)
    np.testing.assert_allclose(ledger_rows(result), [1, -1, 5, -3, -4], atol=1e-12)
    assert (result.logit, result.remainder, result.gross) == pytest.approx((-2, 0, 14))


def test_gross_is_that_of_the_opposite_direction_too(by_hand):
    result = ledger(by_hand, np.array([-1.0, 1.0]), 10)
    np.testing.assert_allclose(ledger_rows(result), [-1, 1, -5, 3, 4], atol=1e-12)
    assert (result.logit, result.gross) == pytest.approx((2, 14))


def test_remainder_is_what_the_rows_lack(by_hand):
    by_hand.rows[0, 0] -= 0.25
    assert ledger(by_hand, np.array([1.0, 0.0]), 10).remainder == pytest.approx(2.5)


def test_shares_of_the_gross_add_up_to_one(by_hand):
    result = ledger(by_hand, np.array([1.0, -1.0]), 10)
    assert np.abs(ledger_rows(result) / result.gross).sum() == pytest.approx(1)


def test_feature_contributions_by_hand(by_hand):
    directions = np.array([[[5.0, 5.0], [1.0, 3.0]]])
    fold = np.array([[1.0, 7.0], [2.0, 7.0]])
    contributions = feature_contributions(by_hand, directions, fold, np.array([1.0, 0.0]), 16)
    assert contributions.tolist() == [[16 / (2 * 4) * 0.5 * (1 * 1 + 3 * 2), 0]]


def test_without_and_drop_effects_by_hand(by_hand):
    # (0.6, 0.8) - beta / 4 - (0.4, -0.1) = (0.1, 0.7), times sigma 2 / 1, and beta / 4 = (0.1, 0.2) again
    remaining = np.array([0.3, 1.6]) / np.hypot(0.3, 1.6)
    beta, both = np.array([0.4, 0.8]), np.eye(2)
    np.testing.assert_allclose(by_hand.without(np.array([2]), beta), [remaining])
    expected = 1 / (1 + np.exp(10 * (remaining[1] - remaining[0]))) - 1 / (1 + np.exp(10 * (0.8 - 0.6)))
    np.testing.assert_allclose(drop_effects(by_hand, both, 0, beta, 10), [expected])


def test_row_numbers(by_hand):
    assert (by_hand.layers, by_hand.clt_row(0), by_hand.error_row) == (1, 2, 4)


def test_logits_of_one_image_and_of_many():
    labels = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert logits(np.array([0.6, 0.8]), labels, 10) == pytest.approx([6, 8, 10])
    assert logits(np.eye(2), labels, 10).tolist() == [[10, 0, 6], [0, 10, 8]]


finite = st.floats(-1e3, 1e3)


@given(arrays(np.float64, array_shapes(max_dims=2, max_side=6), elements=finite), finite)
def test_probabilities_add_up_to_one_and_ignore_a_common_shift(values, shift):
    result = probabilities(values)
    assert (result >= 0).all()
    np.testing.assert_allclose(result.sum(-1), 1)
    np.testing.assert_allclose(probabilities(values + shift), result, rtol=0, atol=1e-9)


@given(arrays(np.float32, st.integers(1, 6), elements=st.floats(-(2.0**126), 2.0**126, width=32)))
def test_probabilities_of_huge_logits_are_finite(values):
    result = probabilities(values)
    assert result.sum() == pytest.approx(1)
    assert result[values.argmax()] == result.max()


def test_probabilities_by_hand():
    assert probabilities(np.log([[1.0, 3.0], [1.0, 1.0]])) == pytest.approx(np.array([[0.25, 0.75], [0.5, 0.5]]))
