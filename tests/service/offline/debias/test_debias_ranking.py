"""Effects of group and label, against means computed by hand; what is ranked first; thresholds and firing places."""

import numpy as np
import pytest

from vitrine.models.bootstrap import Bootstrap
from vitrine.service.offline.debias.contributions import Contributions
from vitrine.service.offline.debias.cue import in_words, otsu
from vitrine.service.offline.debias.errors import DebiasError
from vitrine.service.offline.debias.examples import Examples
from vitrine.service.offline.debias.firing import of_means
from vitrine.service.offline.debias.ranking import Contrast, contrasts, effects, group_effect, rank
from vitrine.service.offline.debias.unlabelled import by_errors

IS_FIRST = np.array([1, 1, 1, 0, 0, 0, 0], bool)
HAS_CUE = np.array([1, 0, 0, 1, 1, 0, 0], bool)
CUE, LABEL, BOTH, NEITHER = range(4)
TABLE = np.array(  # [n, features]
    [
        [4.0, 2.0, 3.0, 0.0],
        [1.0, 2.0, 2.0, 1.0],
        [1.0, 3.0, 2.0, 0.0],
        [3.0, 0.0, 1.0, 0.0],
        [5.0, 0.0, 1.0, 1.0],
        [0.0, -1.0, 0.0, 0.0],
        [2.0, 0.0, 0.0, 1.0],
    ]
)


def sparse(table, features):
    """Contributions of a table, as the features that are not 0."""
    keys = [np.flatnonzero(row) for row in table]
    values = [row[active] for row, active in zip(table, keys, strict=True)]
    return Contributions(keys, values, features, table.shape[1] // features)


def test_effects_are_differences_of_the_cells_means():
    found = effects(sparse(TABLE, 2), IS_FIRST, HAS_CUE)
    # CUE: with the cue 4 and 4, without 1 and 1
    assert found.group == pytest.approx([3.0, (2 - 2.5 + 0 + 0.5) / 2, 1.0, (0 - 0.5 + 0.5 - 0.5) / 2])
    assert found.label == pytest.approx([0.0, (2 - 0 + 2.5 + 0.5) / 2, 2.0, (0 - 0.5 + 0.5 - 0.5) / 2])
    cells = 2 * IS_FIRST + HAS_CUE
    pooled = sum((cells == cell).mean() * TABLE[cells == cell].var(0, ddof=1) for cell in (0, 1, 2))
    assert found.spread == pytest.approx(np.sqrt(pooled)), "one image alone has no spread"
    assert found.size[CUE] == pytest.approx(3 / np.sqrt(pooled[CUE]))


def test_the_cue_is_first_and_what_says_the_label_is_last():
    compared = effects(sparse(TABLE, 2), IS_FIRST, HAS_CUE)
    assert compared.score[[CUE, BOTH]] == pytest.approx([3.0, 1 / 3**2])
    assert [place.key for place in rank([compared], 2)] == [CUE, BOTH]
    other = effects(sparse(TABLE[:, ::-1].copy(), 2), IS_FIRST, HAS_CUE)
    assert [(place.key, place.contrast) for place in rank([compared, other], 2)] == [(CUE, 0), (3 - CUE, 1)]


def test_a_group_without_images_of_one_label_is_compared_within_the_other():
    kept = ~(IS_FIRST & HAS_CUE)
    found = effects(sparse(TABLE[kept], 2), IS_FIRST[kept], HAS_CUE[kept])
    assert found.group[CUE] == 3.0
    assert found.label[LABEL] == pytest.approx(2.5 + 0.5)


def test_the_effects_interval_is_of_its_resamples():
    table, firsts, cues = (np.tile(part, (20, 1) if part.ndim > 1 else 20) for part in (TABLE, IS_FIRST, HAS_CUE))
    bootstrap = Bootstrap(len(table), seed=1, resamples=200)
    found = group_effect(table[:, CUE], firsts, cues, bootstrap)
    samples = []
    for drawn in bootstrap.drawn(0, len(table)):
        mean = {
            (first, cue): np.average(table[:, CUE], weights=drawn * (firsts == first) * (cues == cue))
            for first in (0, 1)
            for cue in (0, 1)
        }
        samples.append(sum(mean[first, 1] - mean[first, 0] for first in (0, 1)) / 2)
    assert found.value == pytest.approx(3.0)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])), abs=1e-6)


def test_labels_are_compared_with_what_they_are_mistaken_for():
    labels = np.array([0, 0, 1, 1, 2, 2])
    groups = np.array([0, 1, 0, 1, 0, 1])
    half = Examples(
        images=("",) * 6,
        labels=labels,
        groups=groups,
        finding=np.ones(6, bool),
        label_names=("a", "b", "c"),
        group_names=("plain", "red"),
    )
    logits = np.eye(3)[[2, 0, 1, 1, 2, 2]] + [0.0, 0.1, 0.0]  # nothing is taken for the last two
    assert contrasts(half, logits) == [Contrast((0, 1), 1), Contrast((0, 2), 1), Contrast((1, 2), 1)]


def test_dense_columns_are_those_of_the_table():
    assert (sparse(TABLE, 2).dense(np.array([3, 0])) == TABLE[:, [3, 0]]).all()


def test_otsu_parts_two_clusters():
    values = np.concatenate([np.linspace(0, 1, 30), np.linspace(5, 6, 10)])
    assert 1 < otsu(np.random.default_rng(0).permutation(values)) < 5


def test_a_cue_in_words_parts_each_label_even_where_it_goes_with_one():
    generator = np.random.default_rng(0)
    cue, other = np.eye(2)
    has_cue = np.array([True] * 45 + [False] * 15 + [True] * 20 + [False] * 40)
    noise = 0.1 * generator.standard_normal((120, 2))
    embeddings = np.where(has_cue[:, None], cue, other) + noise
    labels = np.repeat([0, 1], 60)
    assert (in_words(embeddings, labels, cue[None], other[None]) == has_cue).all()
    always = np.repeat([True, False], 60)  # of one label all: within it those that have more of it
    found = in_words(np.where(always[:, None], cue, other) + noise, labels, cue[None], other[None])
    assert [int(found[labels == label].sum()) for label in (0, 1)] == [30, 30]


def test_where_a_feature_fires_and_what_lies_between_the_groups():
    means = np.zeros((2, 2, 4))  # cells, features, tokens
    means[1, 0] = [0, 4, 3, 1]
    means[:, 1, 2] = -2, -4
    first, second = of_means(means)
    assert (first.tokens, first.between) == ((1, 2), 3.5 / 2)
    assert (second.tokens, second.between) == ((2,), -3.0)


def test_what_moves_the_errors_is_found_among_images_predicted_alike():
    generator, count = np.random.default_rng(0), 400
    is_first, has_cue = generator.random((2, count)) < 0.5
    own = np.where(is_first, 1.0, -1.0) + 0.5 * generator.standard_normal(count)  # of the label itself
    cue = 1.4 * has_cue
    found = by_errors(sparse(np.stack([own, cue], 1), 2), is_first, own + cue > 0.7)
    assert found.keys.tolist() == [1]
    assert (found.has_cue(sparse(np.stack([own, cue], 1), 2), is_first) == has_cue).all()
    with pytest.raises(DebiasError, match=r"all right or all wrong.*--groups.*--cue"):
        by_errors(sparse(np.stack([own, cue], 1), 2), is_first, is_first)
