"""A bundle of every sparsifier, cross-layer and per-layer, from the engine to the answer."""

import io

import numpy as np
import pytest
from rich.console import Console

from vitrine.service.answers.explain import account
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import LabelSet
from vitrine.service.exports.render import print_answer
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import AttributeResponse, Explain
from vitrine.service.schemas.base import Model

NAMES = ("cat", "dog", "car")
IMAGES = 4


@pytest.fixture(scope="module")
def pixels(make_pixels):
    return make_pixels(IMAGES, seed=11)


@pytest.fixture(scope="module")
def labels(clip):
    return LabelSet(NAMES, clip.encode_labels(list(NAMES), ["{}"]).numpy())


@pytest.fixture(scope="module")
def parts(any_bundle, pixels):
    engine = Engine(any_bundle, Settings(bundle=any_bundle.path))
    return engine.explain(pixels.numpy())


def test_embedding_is_open_clips(parts, clip, pixels):
    expected = clip.model.encode_image(pixels, normalize=True).numpy()
    np.testing.assert_allclose(np.stack([part.embedding for part in parts]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("contrast", [None, "car"])
def test_ledger_adds_up_and_features_to_their_rows(parts, any_bundle, labels, contrast):
    active = []
    for part in parts:
        explanations, _ = account(
            part, labels, any_bundle, Explain(targets=["cat", "dog"], contrast=contrast, features=999)
        )
        for explanation in explanations:
            book = explanation.ledger
            total = book.prior + sum(book.attention) + sum(book.clt) + book.bias + book.error + book.remainder
            assert total == pytest.approx(explanation.logit, abs=1e-9)
            assert abs(book.remainder) < 1e-3
            for layer in explanation.layers:
                assert sum(f.contribution for f in layer.features) == pytest.approx(layer.contribution, abs=1e-4)
                assert all(feature.activation != 0 for feature in layer.features)
                listed = [feature.index for feature in layer.features]
                assert len(set(listed)) == len(listed) == np.count_nonzero(part.feature_values[layer.layer])
                sizes = [abs(feature.contribution) for feature in layer.features]
                assert sizes == sorted(sizes, reverse=True)
        active.append([len(layer.features) for layer in explanations[0].layers])
    shape, sparsifier = any_bundle.manifest.shape, any_bundle.manifest.sparsifier
    assert 0 < np.max(active) <= shape.k
    if sparsifier == "abs_topk":
        assert (np.array(active) == shape.k_cls).all()
    elif sparsifier == "relu_topk":
        assert (np.array(active) <= shape.k_cls).all()
    else:
        assert len(np.unique(active)) > 1  # as many as exceed their thresholds


def test_signs_are_the_sparsifiers(parts, any_bundle):
    values = np.stack([part.feature_values for part in parts])
    assert (values < 0).any() == (any_bundle.manifest.sparsifier == "abs_topk")
    assert (values > 0).any()


def test_answer_is_printed(parts, any_bundle, labels):
    explanations, fidelity = account(parts[0], labels, any_bundle, Explain())
    answer = AttributeResponse(
        request_id="x", model=Model(name="x", digest="x"), predictions=[], explanations=explanations,
        fidelity=fidelity, timings_ms={},
    )  # fmt: skip
    text = io.StringIO()
    print_answer(AttributeResponse.model_validate_json(answer.model_dump_json()), Console(file=text, width=200))
    for layer in explanations[0].layers:
        for feature in layer.features:
            assert f"#{feature.index} {feature.contribution:+.2f}" in text.getvalue()
