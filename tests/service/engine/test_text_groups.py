"""Which texts are encoded together."""

import itertools

import numpy as np
import pytest

from vitrine.service.engine.text_groups import (
    GPU_TEXTS,
    LEAST_SECONDS,
    LEAST_TOKENS,
    MOST_SECONDS,
    MOST_TOKENS,
    SHORT,
    TextGroups,
)

CONTEXT = 77


def text_groups(any_length=True, on_gpu=False, context=CONTEXT):
    return TextGroups(context, 0, any_length, on_gpu)


def learn(groups, seconds, times=40, most=10**6):
    """Let it encode what it takes, at most `most` tokens, on a machine that needs `seconds(tokens)`."""
    for _ in range(times):
        tokens = min(groups.tokens, most)
        groups.record(tokens, seconds(tokens))
    return groups.tokens


def test_every_text_is_in_one_group_beside_texts_of_its_length():
    lengths = np.random.default_rng(0).integers(2, CONTEXT + 1, 300).tolist()
    groups = text_groups()
    groups.tokens = 100
    divided = [group.tolist() for group in groups.divide(lengths)]
    assert sorted(itertools.chain(*divided)) == list(range(300))
    assert [lengths[index] for group in divided for index in group] == sorted(lengths)
    for group, following in itertools.pairwise(divided):
        longest, after = lengths[group[-1]], lengths[following[0]]
        assert len(group) * longest <= 100
        assert (len(group) + 1) * after > 100 or after > 1.25 * lengths[group[0]]  # it was full


def test_a_short_text_is_not_made_long_for_the_sake_of_company():
    groups = text_groups()
    groups.tokens = 1000
    assert [group.tolist() for group in groups.divide([77, 6, 7, 70, 6])] == [[1, 4, 2], [3, 0]]


def test_a_group_is_as_large_as_what_was_learnt_from_those_before_it():
    groups = text_groups()
    groups.tokens, sizes = 40, []
    for group in groups.divide([4] * 100):
        sizes.append(len(group))
        groups.tokens = 80
    assert sizes == [10, 20, 20, 20, 20, 10]


@pytest.mark.parametrize("by_token", [1e-6, 1e-5, 1e-4, 3e-4])
@pytest.mark.parametrize("image", [0.0, 0.01, 0.05, 3.0])
def test_groups_take_half_as_long_as_an_image_within_limits(by_token, image):
    groups = text_groups()
    groups.give_way_to(image)
    assert groups.seconds == min(max(image / 2, LEAST_SECONDS), MOST_SECONDS)
    tokens = learn(groups, lambda tokens: 0.001 + tokens * by_token)
    taken = 0.001 + tokens * by_token
    assert tokens in (LEAST_TOKENS, MOST_TOKENS) or groups.seconds / 2 <= taken <= 1.1 * groups.seconds


def test_a_slow_machine_encodes_few_texts_at_a_time():
    groups = text_groups()
    assert learn(groups, lambda tokens: tokens * 1.0) == LEAST_TOKENS
    assert [group.tolist() for group in groups.divide([70, 60, 8, 8, 8])] == [[2, 3, 4], [1], [0]]


def test_one_disturbed_group_does_not_change_much_and_is_soon_forgotten():
    groups = text_groups()
    before = learn(groups, lambda tokens: tokens * 1e-4)
    groups.record(before, 10.0)
    assert groups.tokens >= before // 2
    assert learn(groups, lambda tokens: tokens * 1e-4, times=3) == pytest.approx(before, rel=0.1)


def test_small_groups_say_nothing_of_large_ones():
    groups = text_groups()
    before = learn(groups, lambda tokens: 0.008 + tokens * 1e-4)
    assert learn(groups, lambda tokens: 0.008 + tokens * 1e-4, most=8) == before


def test_texts_are_padded_to_the_longest():
    assert text_groups().pad([[1, 2], [3, 4, 5]]).tolist() == [[1, 2, 0], [3, 4, 5]]
    assert text_groups(any_length=False, context=5).pad([[1, 2], [3, 4, 5]]).tolist() == [
        [1, 2, 0, 0, 0],
        [3, 4, 5, 0, 0],
    ]
    assert TextGroups(9, 7, True, False).pad([[1], [1]]).tolist() == [[1, 7], [1, 7]]  # no graph takes one token


def test_texts_of_a_graph_of_one_length_cost_that_length():
    groups = text_groups(any_length=False)
    groups.tokens = 3 * CONTEXT
    assert [len(group) for group in groups.divide([2, 3, 4, 5])] == [3, 1]


@pytest.mark.parametrize(("any_length", "lengths"), [(True, {8, 16, 32, 64, 77}), (False, {77})])
def test_a_gpu_sees_few_shapes_and_all_of_them_beforehand(any_length, lengths):
    groups = text_groups(any_length, on_gpu=True)
    warm = [groups.pad(texts).shape for texts in groups.warm_up()]
    assert len(warm) == len(set(warm))
    assert set(warm) == {(texts, length) for texts in GPU_TEXTS for length in lengths}
    assert {warm[0], warm[1]} == {(1, min(lengths)), (64, 77)}  # between which TensorRT plans once
    texts = [[1] * length for length in np.random.default_rng(0).integers(2, CONTEXT + 1, 200)]
    divided = list(groups.divide([len(text) for text in texts]))
    assert [len(group) for group in divided] == [64, 64, 64, 8]
    for group in divided:
        tokens = groups.pad([texts[index] for index in group])
        assert tokens.shape in warm
        assert tokens[len(group) - 1].any()


def test_warm_up_learns_the_pace_and_has_a_short_and_the_longest_text():
    groups, shapes = text_groups(), []
    for texts in groups.warm_up():
        tokens = groups.pad(texts)
        shapes.append(tokens.shape)
        groups.record(tokens.size, tokens.size * 1e-4)
    assert shapes[0] == (1, CONTEXT)
    assert min(length for _, length in shapes) == SHORT
    assert groups.tokens == pytest.approx(MOST_SECONDS / 1e-4, rel=0.1)
    assert max(texts for texts, _ in text_groups_shapes(context=4)) >= 1


def text_groups_shapes(**options):
    groups = text_groups(**options)
    return [groups.pad(texts).shape for texts in groups.warm_up()]
