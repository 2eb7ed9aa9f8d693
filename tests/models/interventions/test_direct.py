"""Interventions in direct mode, in float64, against the residual with the change made and its head computed anew."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrine.models.account.ledger import Decomposition, Details, feature_contributions, ledger
from vitrine.models.interventions.changes import InterventionError, resolve
from vitrine.models.interventions.direct import changed
from vitrine.models.interventions.spec import Intervention

LAYERS, HEADS, TOKENS, FEATURES, WIDTH, EMBEDDING, K = 3, 2, 5, 6, 8, 4, 3
EPSILON, SCALE = 1e-5, 20.0
ROWS = 2 * LAYERS + 3


class Case:
    """A residual of random components, and the tables of a bundle."""

    layers, tokens, heads, width = LAYERS, TOKENS, HEADS, WIDTH

    def __init__(self, seed=0):
        draw = np.random.default_rng(seed)
        self.gamma, self.ln_beta = draw.normal(1, 0.3, WIDTH), draw.normal(0, 0.3, WIDTH)
        self.proj = draw.normal(size=(WIDTH, EMBEDDING))
        self.tables = SimpleNamespace(
            directions=draw.normal(size=(LAYERS, FEATURES, WIDTH)),
            fold=(np.eye(WIDTH) - 1 / WIDTH) @ np.diag(self.gamma) @ self.proj,
            beta=self.ln_beta @ self.proj,
        )
        self.encoder = draw.normal(size=WIDTH)
        self.mean, self.stream = draw.integers(0, 16, 2) / 8, draw.normal(size=(2, WIDTH))
        self.indices = np.stack([draw.permutation(FEATURES)[:K] for _ in range(LAYERS)])
        self.values = draw.uniform(0.5, 2, (LAYERS, K))
        self.values[:, -1] = 0  # an unused place
        self.head_parts = draw.normal(size=(LAYERS, HEADS, WIDTH))
        self.components = draw.normal(size=(ROWS, WIDTH))
        self.components[1 : 1 + LAYERS] = self.head_parts.sum(1) + draw.normal(size=(LAYERS, WIDTH))
        self.components[1 + LAYERS : 1 + 2 * LAYERS] = np.einsum("lk,lkd->ld", self.values, self._written())
        self.labels = draw.normal(size=(3, EMBEDDING))
        self.parts = self.decompose(self.components)

    def _written(self):
        return self.tables.directions[np.arange(LAYERS)[:, None], self.indices]

    def features(self, dictionary, layer):
        return FEATURES

    def means(self, dictionary, layer, index):
        return self.mean

    def direction(self, dictionary, layer, index, kind):
        return self.tables.directions[layer, index] if kind == "decoder" else self.encoder

    def mean_stream(self, at):
        return self.stream

    def sigma(self, residual):
        return np.sqrt(residual.var(-1) + EPSILON)

    def embed(self, residual):
        """ln_post and the projection, as they are written down."""
        return ((residual - residual.mean()) / self.sigma(residual) * self.gamma + self.ln_beta) @ self.proj

    def decompose(self, components):
        residual = components.sum(0)
        z, sigma = self.embed(residual), float(self.sigma(residual))
        norm = float(np.linalg.norm(z))
        rows = components @ self.tables.fold / (sigma * norm)
        rows[2 * LAYERS + 1] += self.tables.beta / norm
        nothing = np.zeros(0)
        return Decomposition(
            embedding=z / norm,
            rows=rows,
            sigma=sigma,
            sigma_without=self.sigma(residual - components),
            norm=norm,
            feature_indices=self.indices,
            feature_values=self.values,
            projection=np.zeros(LAYERS),
            r2=0.9,
            cosine=0.9,
            details=Details(nothing, nothing, nothing, nothing, self.head_parts),
            components=components,
        )

    def changed(self, *items, parts=None):
        edits = resolve([Intervention.model_validate(item) for item in items], self, "direct")
        return changed(self.parts if parts is None else parts, edits, self.tables)


def assert_same(found, expected):
    """The same account, and nothing in the row that interventions add."""
    for name in ("embedding", "sigma", "norm"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
    for name in ("rows", "components", "sigma_without"):
        np.testing.assert_allclose(getattr(found, name)[:ROWS], getattr(expected, name), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.rows.sum(0), found.embedding, atol=1e-12)
    np.testing.assert_allclose(found.components[ROWS:].sum(0), np.zeros(WIDTH), atol=1e-12)


@st.composite
def features_changed(draw):
    """(item, z -> z') of one feature."""
    op = draw(st.sampled_from(["ablate", "mean", "scale", "set"]))
    value = draw(st.integers(-24, 24)) / 8  # exact in float32
    item = {"layer": draw(st.integers(0, LAYERS - 1)), "index": draw(st.integers(0, FEATURES - 1)), "op": op}
    if op == "mean":
        return item | {"op": "ablate", "to": "mean"}, lambda z, case: case.mean[0]
    if op == "ablate":
        return item, lambda z, case: 0.0
    return item | {"value": value}, (lambda z, case: value * z) if op == "scale" else (lambda z, case: value)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 9),
    st.lists(features_changed(), max_size=4, unique_by=lambda one: (one[0]["layer"], one[0]["index"])),
)
def test_changed_features_write_what_their_new_activations_do(seed, edits):
    case = Case(seed)
    components, codes = case.components.copy(), np.zeros((LAYERS, FEATURES))
    np.put_along_axis(codes, case.indices, case.values, axis=1)
    for item, new in edits:
        layer, index = item["layer"], item["index"]
        after = new(codes[layer, index], case)
        components[1 + LAYERS + layer] += (after - codes[layer, index]) * case.tables.directions[layer, index]
        codes[layer, index] = after
    found = case.changed(*(item for item, _ in edits))
    assert_same(found, case.decompose(components))
    dense = np.zeros_like(codes)
    np.add.at(dense, (np.arange(LAYERS)[:, None], found.feature_indices), found.feature_values)
    np.testing.assert_allclose(dense, codes, rtol=1e-6, atol=1e-6)
    contributions = feature_contributions(found, case.tables.directions, case.tables.fold, case.labels[0], SCALE)
    np.testing.assert_allclose(contributions.sum(1), ledger(found, case.labels[0], SCALE).clt, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.dictionaries(st.integers(0, ROWS - 1), st.integers(-16, 16), min_size=1))
def test_rows_are_multiplied_by_their_factors(seed, factors):
    case = Case(seed)
    names = ["prior", *["attention"] * LAYERS, *["clt"] * LAYERS, "bias", "error"]
    items, components = [], case.components.copy()
    for row, eighths in factors.items():
        factor = eighths / 8
        layer = {"layer": (row - 1) % LAYERS} if names[row] in ("attention", "clt") else {}
        items.append({"op": "scale", "row": names[row], "value": factor, **layer})
        components[row] *= factor
    found = case.changed(*items)
    assert_same(found, case.decompose(components))


@pytest.mark.parametrize("row", range(ROWS))
def test_taking_out_a_row_is_what_the_ledger_says_without_it(row):
    case = Case()
    name = ["prior", *["attention"] * LAYERS, *["clt"] * LAYERS, "bias", "error"][row]
    layer = {"layer": (row - 1) % LAYERS} if name in ("attention", "clt") else {}
    found = case.changed({"op": "ablate", "row": name, **layer})
    (expected,) = case.parts.without(np.array([row]), case.tables.beta)
    np.testing.assert_allclose(found.embedding, expected, atol=1e-9)
    left = found.rows[row] - (case.tables.beta / found.norm if name == "bias" else 0)
    np.testing.assert_allclose(left, np.zeros(EMBEDDING), atol=1e-12)


def test_ablating_all_features_of_a_layer_is_taking_out_its_row():
    case = Case()
    for layer in range(LAYERS):
        one_by_one = case.changed(*({"op": "ablate", "layer": layer, "index": n} for n in range(FEATURES)))
        at_once = case.changed({"op": "ablate", "row": "clt", "layer": layer})
        np.testing.assert_allclose(one_by_one.rows, at_once.rows, atol=1e-9)
        np.testing.assert_allclose(one_by_one.sigma_without, at_once.sigma_without, atol=1e-9)
        assert not one_by_one.feature_values[layer].any()
        assert not at_once.feature_values[layer].any()


def test_heads_are_parts_of_their_attention_row():
    case = Case()
    found = case.changed(
        {"op": "ablate", "layer": 1, "head": 0},
        {"op": "scale", "layer": 2, "head": 1, "value": 0.5},
        {"op": "scale", "layer": 1, "row": "attention", "value": 2.0},
    )
    components = case.components.copy()
    components[2] = 2 * (components[2] - case.head_parts[1, 0])
    components[3] -= 0.5 * case.head_parts[2, 1]
    assert_same(found, case.decompose(components))


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("to", ["zero", "mean"])
def test_a_projection_leaves_nothing_along_its_directions(kind, to):
    """Or the average picture's part; it stands in a row of its own."""
    case = Case()
    features = [(0, 1), (2, 4)] if kind == "decoder" else [(0, 1)]
    items = [
        {"op": "project", "layer": layer, "index": index, "to": to, "direction": kind} for layer, index in features
    ]
    found = case.changed(*items, {"op": "ablate", "row": "error"})
    span = np.linalg.qr(np.stack([case.direction("clt", *feature, kind) for feature in features]).T)[0]  # [d, n]
    components = case.components.copy()
    components[-1] = 0
    residual = components.sum(0)
    edit = span @ span.T @ ((case.stream[0] if to == "mean" else 0) - residual)
    components = np.concatenate([components, edit[None]])
    np.testing.assert_allclose(found.components, components, atol=1e-5)  # the basis is float32
    np.testing.assert_allclose(found.embedding, case.decompose(components).embedding, atol=1e-5)
    np.testing.assert_allclose(found.rows.sum(0), found.embedding, atol=1e-12)
    account = ledger(found, case.labels[1], SCALE)
    assert account.edit == pytest.approx(SCALE * found.rows[-1] @ case.labels[1])
    assert account.remainder == pytest.approx(0, abs=1e-9)


def test_the_stream_is_given_a_value_along_a_vector_whatever_the_others_are():
    """Vectors of any length that are not orthogonal, beside a feature that is set to the mean."""
    case, draw = Case(), np.random.default_rng(3)
    first, second = draw.normal(size=(2, WIDTH)) * 5
    found = case.changed(
        {"op": "project", "layer": LAYERS - 1, "vector": tuple(first), "value": 1.5, "tokens": "cls"},
        {"op": "project", "layer": LAYERS - 1, "vector": tuple(second)},
        {"op": "project", "layer": 0, "index": 1, "to": "mean"},
    )
    feature = case.direction("clt", 0, 1, "decoder")
    units = np.stack([row / np.linalg.norm(row) for row in (first, second, feature)])
    after, before = found.components.sum(0), case.components.sum(0)
    np.testing.assert_allclose(units @ after, [1.5, 0, units[2] @ case.stream[0]], atol=1e-5)
    beside = np.linalg.svd(units)[2][3:]
    np.testing.assert_allclose(beside @ after, beside @ before, atol=1e-5)


def test_a_vector_of_an_earlier_layer_is_no_part_of_the_final_residual():
    case = Case()
    vector = tuple(np.random.default_rng(3).normal(size=WIDTH))
    assert case.changed({"op": "project", "layer": 0, "vector": vector, "tokens": "cls"}) is case.parts


def test_vectors_that_do_not_fit_are_refused():
    case, along = Case(), {"op": "project", "layer": LAYERS - 1, "vector": (1.0,) * WIDTH}
    with pytest.raises(InterventionError, match=r"intervention 0: the stream has 8 components, but the vector has 3"):
        case.changed(along | {"vector": (1, 2, 3)})
    with pytest.raises(InterventionError, match="along the same direction at the same tokens set different values"):
        case.changed(along | {"value": 1}, along | {"value": 2})
    twice = case.changed(along | {"value": 2}, along | {"value": 2, "vector": (3.0,) * WIDTH})
    np.testing.assert_allclose(twice.components, case.changed(along | {"value": 2}).components, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"op": "ablate"}, "ablate cannot be used with a vector"),
        ({"op": "set", "value": 1}, "set cannot be used with a vector"),
        ({"vector": (0.0, 0.0)}, "a vector of zeros has no direction"),
        ({"vector": (float("nan"),)}, "finite"),
        ({"vector": ()}, "at least 1 item"),
        ({"layer": None}, "requires a layer"),
        ({"index": 3}, "give exactly one of index (a feature), row, head and vector, not index, vector"),
        ({"value": 1, "to": "mean"}, "give `to: mean` or a value, not both"),
        ({"direction": "encoder"}, "`direction` can only be used with features that are projected"),
        ({"dictionary": "residual"}, "`dictionary` can only be used with features"),
    ],
)
def test_what_cannot_be_said_of_a_vector(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Intervention.model_validate({"op": "project", "layer": 1, "vector": (1.0, 2.0)} | fields)


def test_edits_of_an_edited_account_are_edits_of_both():
    case = Case()
    first, second = {"op": "ablate", "layer": 0, "index": 1}, {"op": "scale", "row": "prior", "value": 0.5}
    one_by_one, at_once = case.changed(second, parts=case.changed(first)), case.changed(first, second)
    np.testing.assert_allclose(one_by_one.rows, at_once.rows, atol=1e-12)
    assert one_by_one.rows.shape == (ROWS + 1, EMBEDDING)


def test_what_changes_nothing_leaves_the_very_same():
    case = Case()
    silent = next(index for index in range(FEATURES) if index not in case.indices[0])
    for items in (
        [],
        [{"op": "scale", "layer": 0, "index": 1, "value": 1.0}],
        [{"op": "scale", "row": "error", "value": 1.0}],
        [{"op": "ablate", "layer": 0, "index": silent}],
    ):
        assert case.changed(*items) is case.parts


def test_what_a_bundle_has_not_is_refused_by_name():
    case = Case()
    old = replace(case.parts, components=None)
    with pytest.raises(InterventionError, match="export it again"):
        case.changed({"op": "ablate", "row": "prior"}, parts=old)
    with pytest.raises(InterventionError, match=r"heads, .*: export it again"):
        case.changed({"op": "ablate", "layer": 0, "head": 0}, parts=replace(case.parts, details=None))
    with pytest.raises(InterventionError, match=r"mlp of layer 1.*rerun"):
        case.changed({"op": "ablate", "row": "mlp", "layer": 1})
    everything = [{"op": "ablate", "row": row} for row in ("prior", "bias", "error")]
    everything += [{"op": "ablate", "row": row, "layer": n} for row in ("attention", "clt") for n in range(LAYERS)]
    case.ln_beta, case.tables.beta = np.zeros(WIDTH), np.zeros(EMBEDDING)
    with pytest.raises(InterventionError, match="everything that depends on the image"):
        case.changed(*everything, parts=case.decompose(case.components))
