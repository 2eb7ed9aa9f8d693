"""From decompositions to accounts: the service's numbers equal those of `models.account.ledger`."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from vitrine.models.account import ledger
from vitrine.service.answers.explain import account, check_explain, lens, predict
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import LabelSet
from vitrine.service.errors import ServiceError
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import Explain

NAMES = ("cat", "dog", "car", "tree")


@pytest.fixture(scope="module")
def parts(engine, make_pixels):
    (decomposition,) = engine.explain(make_pixels(1, seed=5).numpy())
    return decomposition


@pytest.fixture(scope="module")
def labels(bundle):
    embeddings = np.random.default_rng(0).standard_normal((len(NAMES), bundle.manifest.shape.embedding), np.float32)
    return LabelSet(NAMES, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def scale(bundle):
    return bundle.manifest.logit_scale


@pytest.mark.parametrize("contrast", [None, "car"])
@pytest.mark.parametrize("target", NAMES[:2])
def test_account_is_the_ledgers(parts, labels, bundle, scale, target, contrast):
    explain = Explain(targets=[target], contrast=contrast, features=1000)
    (explanation,), _ = account(parts, labels, bundle, explain)
    index = NAMES.index(target)
    direction = labels.embeddings[index]
    if contrast:
        direction = direction - labels.embeddings[NAMES.index(contrast)]
    book = ledger.ledger(parts, direction, scale)
    assert (explanation.target, explanation.contrast) == (target, contrast)
    assert explanation.logit == book.logit
    assert explanation.ledger.prior == book.prior
    assert explanation.ledger.attention == book.attention.tolist()
    assert explanation.ledger.clt == book.clt.tolist()
    assert (explanation.ledger.bias, explanation.ledger.error) == (book.bias, book.error)
    assert explanation.ledger.remainder == book.remainder
    effects = ledger.drop_effects(parts, labels.embeddings, index, bundle.beta, scale)
    contributions = ledger.feature_contributions(parts, bundle.directions, bundle.fold, direction, scale)
    for layer in explanation.layers:
        assert layer.contribution == book.clt[layer.layer]
        assert layer.share == pytest.approx(abs(book.clt[layer.layer]) / book.gross)
        assert layer.projection == parts.projection[layer.layer]
        assert layer.drop_effect == effects[layer.layer]
        features = {feature.index: (feature.activation, feature.contribution) for feature in layer.features}
        active = parts.feature_values[layer.layer] > 0
        expected = zip(
            parts.feature_values[layer.layer][active].tolist(), contributions[layer.layer][active].tolist(), strict=True
        )
        assert features == dict(zip(parts.feature_indices[layer.layer][active].tolist(), expected, strict=True))


def test_drop_effect_is_the_targets_even_with_a_contrast(parts, labels, bundle):
    plain, _ = account(parts, labels, bundle, Explain(targets=["cat"]))
    contrasted, _ = account(parts, labels, bundle, Explain(targets=["cat"], contrast="dog"))
    assert [layer.drop_effect for layer in plain[0].layers] == [layer.drop_effect for layer in contrasted[0].layers]


def test_features_that_are_not_active_are_not_listed(parts, labels, bundle):
    values = parts.feature_values.copy()
    values[0, 2:] = 0
    values[1] = 0
    modified = type(parts)(**{**vars(parts), "feature_values": values})
    (explanation,), _ = account(modified, labels, bundle, Explain(features=1000))
    assert [len(layer.features) for layer in explanation.layers] == [2, 0, (values[2] > 0).sum()]


def test_targets_default_to_the_largest_logit(parts, labels, bundle, scale):
    explanations, _ = account(parts, labels, bundle, Explain())
    values = ledger.logits(parts.embedding, labels.embeddings, scale)
    assert [explanation.target for explanation in explanations] == [NAMES[values.argmax()]]


def test_fidelity_is_about_the_largest_logit_whatever_the_target(parts, labels, bundle, scale):
    values = ledger.logits(parts.embedding, labels.embeddings, scale)
    top1, last = int(values.argmax()), NAMES[values.argmin()]
    book = ledger.ledger(parts, labels.embeddings[top1], scale)
    without_error = parts.without(np.array([parts.error_row]), bundle.beta)[0]
    for explain in (Explain(), Explain(targets=[last]), Explain(contrast=last)):
        _, fidelity = account(parts, labels, bundle, explain)
        assert (fidelity.r2, fidelity.cosine) == (parts.r2, parts.cosine)
        assert fidelity.error_share == pytest.approx(abs(book.error) / book.gross)
        assert fidelity.reconstructed_top1_agrees == (int((labels.embeddings @ without_error).argmax()) == top1)


def test_reconstruction_may_disagree(parts, bundle):
    """Two labels that differ only by the error row: without it, the other one wins."""
    with_error, without = parts.embedding, parts.without(np.array([parts.error_row]), bundle.beta)[0]
    labels = LabelSet(("as it is", "without the error"), np.stack([with_error, without]))
    _, fidelity = account(parts, labels, bundle, Explain())
    assert not fidelity.reconstructed_top1_agrees
    same = LabelSet(("as it is", "its opposite"), np.stack([with_error + without, -with_error - without]))
    _, fidelity = account(parts, same, bundle, Explain())
    assert fidelity.reconstructed_top1_agrees


def test_predictions_are_sorted_and_a_softmax_over_all_labels(parts, labels, scale):
    predictions = predict(parts, labels, scale, 3)
    values = ledger.logits(parts.embedding, labels.embeddings, scale)
    order = np.argsort(-values)[:3]
    assert [prediction.label for prediction in predictions] == [NAMES[i] for i in order]
    assert [prediction.logit for prediction in predictions] == values[order].tolist()
    share = np.exp(values.astype(np.float64)) / np.exp(values.astype(np.float64)).sum()
    assert [prediction.probability for prediction in predictions] == pytest.approx(share[order])
    assert len(predict(parts, labels, scale, 99)) == len(NAMES)


def test_equal_labels_keep_their_order(parts, scale):
    twins = LabelSet(("first", "second"), np.stack([parts.embedding] * 2))
    assert [prediction.label for prediction in predict(parts, twins, scale, 2)] == ["first", "second"]


@pytest.mark.parametrize(
    "explain",
    [Explain(), Explain(targets=["cat"]), Explain(targets=["cat"] * 3, contrast="dog"), Explain(contrast="cat")],
)
def test_explain_within_its_bounds_is_accepted(explain, engine):
    check_explain(explain, NAMES, 3, engine)


@pytest.mark.parametrize(
    ("explain", "named"),
    [
        (Explain(targets=["cat", "zebra"]), "'zebra'"),
        (Explain(contrast="Cat"), "'Cat'"),
        (Explain(targets=["cat"] * 4), "4"),
    ],
)
def test_explain_out_of_bounds_is_refused_by_name(explain, named, engine):
    with pytest.raises(ServiceError, match=named) as caught:
        check_explain(explain, NAMES, 3, engine)
    assert caught.value.code == "invalid_request"


@pytest.mark.parametrize("wanted", ["heatmap", "lens"])
def test_details_of_a_bundle_that_has_none_are_refused(bundle, wanted):
    files = {name: entry for name, entry in bundle.manifest.files.items() if name != "attention.npy"}
    older = replace(bundle, manifest=bundle.manifest.model_copy(update={"files": files}))
    old_engine = SimpleNamespace(bundle=older, sources=None)
    check_explain(Explain(), NAMES, 3, old_engine)
    with pytest.raises(
        ServiceError, match="'tiny' is from a version without heat maps and the lens; export it again"
    ) as caught:
        check_explain(Explain(**{wanted: True}), NAMES, 3, old_engine)
    assert caught.value.code == "invalid_request"


@pytest.mark.parametrize(
    ("has_replacement", "reason"),
    [(True, "VITRINE_REPLACEMENT=false"), (False, "it was exported without `bundle.replacement = true` in its recipe")],
)
def test_matrix_without_the_graph_is_refused(bundle, has_replacement, reason):
    files = {name: entry for name, entry in bundle.manifest.files.items() if not name.startswith("replacement")}
    without = replace(bundle, manifest=bundle.manifest.model_copy(update={"files": files}))
    engine = Engine(bundle if has_replacement else without, Settings(replacement=False))
    check_explain(Explain(), NAMES, 3, engine)
    with pytest.raises(ServiceError, match=re.escape(f"needs the replacement graph of 'tiny': {reason}")) as caught:
        check_explain(Explain(matrix=True), NAMES, 3, engine)
    assert caught.value.code == "invalid_request"


def test_lens_is_the_prediction_of_each_layers_embedding(engine, labels, scale, make_pixels):
    (parts,) = engine.explain(make_pixels(1, seed=5).numpy(), [True])
    for prediction, embedding in zip(lens(parts, labels, scale), parts.details.lens, strict=True):
        share = np.exp(scale * labels.embeddings.astype(np.float64) @ embedding)
        share /= share.sum()
        assert (prediction.label, prediction.probability) == (
            NAMES[share.argmax()],
            pytest.approx(share.max(), rel=1e-4),
        )
        assert prediction.entropy == pytest.approx(-(share * np.log(share)).sum(), abs=1e-4)


def test_entropy_of_a_certain_prediction_is_zero(engine, bundle, make_pixels):
    (parts,) = engine.explain(make_pixels(1, seed=5).numpy(), [True])
    certain = LabelSet(("this", "that"), np.stack([parts.details.lens[-1], -parts.details.lens[-1]]))
    assert lens(parts, certain, logit_scale=1e4)[-1].entropy == 0


def test_a_long_list_of_unknown_targets_is_not_recited(engine):
    with pytest.raises(ServiceError) as caught:
        check_explain(Explain(targets=[f"unknown {i}" for i in range(30)]), NAMES, 32, engine)
    assert len(caught.value.message) < 200
