"""Orth-Proj and Orth-Cali against their formulas in float64."""

import numpy as np
import pytest

from vitrine.service.offline.debias.projections import calibrated, orthogonal, projected

RNG = np.random.default_rng(0)


def unit(*shape):
    rows = RNG.standard_normal(shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_nothing_of_the_prompts_is_left_and_what_is_orthogonal_stays():
    prompts = unit(3, 8)
    prompts = np.concatenate([prompts, prompts[:1] + prompts[1:2]])  # one depends on others
    matrix = orthogonal(prompts)
    assert prompts @ matrix == pytest.approx(np.zeros((4, 8)), abs=1e-12)
    assert matrix @ matrix == pytest.approx(matrix)
    assert np.trace(matrix) == pytest.approx(5)
    rest = unit(8) @ matrix
    assert matrix @ rest == pytest.approx(rest)


def test_the_calibrated_projection_is_where_its_objective_has_no_slope():
    base, first, second, weight = orthogonal(unit(2, 6)), unit(4, 6), unit(4, 6), 3.0
    found = calibrated(base, first, second, weight)
    slope = 2 * (found - base) + sum(
        2 * weight / 4 * np.outer(found @ (one - other), one - other) for one, other in zip(first, second, strict=True)
    )
    assert slope == pytest.approx(np.zeros((6, 6)), abs=1e-12)


def test_labels_are_of_length_one_again_unless_nothing_is_left():
    prompt = unit(1, 6)
    labels = np.concatenate([unit(2, 6), prompt])
    found = projected(labels, orthogonal(prompt))
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1, 0], abs=1e-9)
    assert found[:2] @ prompt[0] == pytest.approx([0, 0], abs=1e-12)
