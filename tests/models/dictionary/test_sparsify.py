"""The four sparsifiers on tokens of four features worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from vitrine.models.dictionary.sparsify import AbsTopK, BatchTopK, JumpReLU, ReluTopK, make_sparsifier

KINDS = ("relu_topk", "abs_topk", "jumprelu", "batch_topk")


def activations(sparsifier, preactivations, is_cls=None):
    """Dense activations [N, F]: select, then forward, then scatter to their features."""
    is_cls = torch.zeros(len(preactivations), dtype=torch.bool) if is_cls is None else tensor(is_cls)
    indices = sparsifier.select(preactivations.detach())
    values = sparsifier(preactivations.gather(-1, indices), indices, is_cls)
    assert indices.shape == values.shape == (len(preactivations), sparsifier.places)
    assert values.dtype == preactivations.dtype
    return torch.zeros_like(preactivations).scatter_add(-1, indices, values)


TOKENS = tensor([[0.5, 3.0, -1.0, 2.0], [-4.0, -3.0, -2.0, 1.0], [-1.0, -2.0, -3.0, -4.0]])


def test_relu_topk_by_hand():
    dense = activations(ReluTopK(4, k=2, k_cls=2), TOKENS)
    assert dense.tolist() == [[0, 3, 0, 2], [0, 0, 0, 1], [0, 0, 0, 0]]  # one positive feature, not two; none at all


def test_abs_topk_by_hand():
    dense = activations(AbsTopK(4, k=2, k_cls=2), TOKENS)
    assert dense.tolist() == [[0, 3, 0, 2], [-4, -3, 0, 0], [0, 0, -3, -4]]


def test_jumprelu_by_hand():
    sparsifier = JumpReLU(4, k=2, k_cls=2)
    sparsifier.log_threshold.data = tensor([0.4, 3.0, 1.0, 0.5]).log()
    dense = activations(sparsifier, TOKENS)  # 3.0 does not exceed 3.0
    assert dense.tolist() == [[0.5, 0, 0, 2], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_jumprelu_takes_those_furthest_above_their_own_thresholds():
    sparsifier = JumpReLU(4, k=1, k_cls=1)
    sparsifier.log_threshold.data = tensor([1.0, 8.0, 1.0, 0.5]).log()
    assert sparsifier.select(tensor([[5.0, 9.0, 3.0, 2.0]])).tolist() == [[0, 2]]  # by 4, 1, 2 and 1.5
    assert activations(sparsifier, tensor([[5.0, 9.0, 3.0, 2.0]])).tolist() == [[5, 0, 3, 0]]  # at most two places


@pytest.mark.parametrize("kind", [ReluTopK, AbsTopK])
def test_budget_of_cls_and_of_patches(kind):
    tokens = tensor([[1.0, 2.0, 3.0, 4.0]] * 2)
    assert activations(kind(4, k=3, k_cls=1), tokens, [True, False]).tolist() == [[0, 0, 0, 4], [0, 2, 3, 4]]
    assert activations(kind(4, k=1, k_cls=3), tokens, [True, False]).tolist() == [[0, 2, 3, 4], [0, 0, 0, 4]]


def test_all_features_may_be_active():
    assert activations(ReluTopK(4, 4, 4), TOKENS).equal(TOKENS.relu())
    assert activations(AbsTopK(4, 4, 4), TOKENS).equal(TOKENS)
    assert activations(BatchTopK(4, 4, 4), TOKENS).equal(TOKENS.relu())
    jump = JumpReLU(4, 4, 4)
    assert jump.places == 4
    assert activations(jump, TOKENS).equal(TOKENS.where(jump.inference_threshold() < TOKENS, 0.0))


@pytest.mark.parametrize("kind", [ReluTopK, AbsTopK])
def test_equals_at_the_edge_take_no_more_than_the_budget(kind):
    assert (activations(kind(4, 2, 2), torch.ones(3, 4)) != 0).sum(-1).tolist() == [2, 2, 2]


# BatchTopK -----------------------------------------------------------------------------------------------------------

BATCH = tensor([[9.0, 8.0, 7.0, -1.0], [3.0, 2.0, 1.0, 0.5], [6.0, 5.0, 4.0, -2.0]])


def test_batch_topk_keeps_the_largest_of_the_batch_by_hand():
    dense = activations(BatchTopK(4, k=2, k_cls=1), BATCH)
    assert dense.tolist() == [[9, 8, 7, 0], [0, 0, 0, 0], [6, 5, 4, 0]]


def test_batch_topk_keeps_them_per_token_type():
    sparsifier = BatchTopK(4, k=1, k_cls=2)
    dense = activations(sparsifier, BATCH, [False, True, False])
    assert dense.tolist() == [[9, 8, 0, 0], [3, 2, 0, 0], [0, 0, 0, 0]]
    assert sparsifier.thresholds.tolist() == [8, 2]


@pytest.mark.parametrize("equal", [False, True])
def test_batch_topk_keeps_exactly_k_times_n(equal):
    """Even with ties, which are frequent in half-precision products."""
    generator = torch.Generator().manual_seed(0)
    preactivations = torch.ones(40, 16) if equal else torch.rand(40, 16, generator=generator)
    is_cls = (torch.arange(40) % 4 == 0).tolist()
    dense = activations(BatchTopK(16, k=3, k_cls=5), preactivations, is_cls)
    assert ((dense[tensor(is_cls)] != 0).sum(), (dense[~tensor(is_cls)] != 0).sum()) == (5 * 10, 3 * 30)
    assert (dense != 0).sum(-1).max() <= 10
    if not equal:
        assert (dense != 0).sum(-1).unique().numel() > 1


@pytest.mark.parametrize("cls", [True, False])
def test_batch_topk_of_one_token_type_alone(cls):
    sparsifier = BatchTopK(4, k=2, k_cls=2)
    assert (activations(sparsifier, BATCH, [cls] * 3) != 0).sum() == 6
    assert sparsifier.thresholds.tolist() == ([-1, 4] if cls else [4, -1])


def test_batch_topk_follows_the_smallest_kept_by_hand():
    sparsifier = BatchTopK(4, k=1, k_cls=1).double()
    for smallest in (8.0, 4.0, 6.0):  # the first is used as is
        activations(sparsifier, tensor([[9.0, smallest, -1, -1], [1, 1, 1, 1]], dtype=torch.float64))
    expected = 0.99 * (0.99 * 8 + 0.01 * 4) + 0.01 * 6
    assert sparsifier.thresholds[0].item() == pytest.approx(expected, abs=1e-12)
    assert sparsifier.thresholds[1] == -1


def test_batch_topk_measures_nothing_outside_training():
    sparsifier = BatchTopK(4, k=1, k_cls=1).eval()
    activations(sparsifier, BATCH)
    assert sparsifier.thresholds.tolist() == [-1, -1]


def test_batch_topk_outside_training_is_a_jumprelu_of_each_token_type():
    sparsifier = BatchTopK(4, k=2, k_cls=2).eval()
    sparsifier.thresholds.copy_(tensor([5.0, 1.5]))
    dense = activations(sparsifier, BATCH, [False, True, False])
    assert dense.tolist() == [[9, 8, 7, 0], [3, 2, 0, 0], [6, 0, 0, 0]]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(KINDS), st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 8))
def test_outside_training_a_code_is_independent_of_batch_mates(kind, seed, k, k_cls):
    generator = torch.Generator().manual_seed(seed)
    preactivations = torch.randn(6, 8, generator=generator)
    is_cls = torch.rand(6, generator=generator) < 0.5
    sparsifier = make_sparsifier(kind, 8, k, k_cls)
    activations(sparsifier, preactivations, is_cls.tolist())  # BatchTopK measures its thresholds
    sparsifier.eval()
    together = activations(sparsifier, preactivations, is_cls.tolist())
    alone = [
        activations(sparsifier, row[None], [bool(cls)])[0] for row, cls in zip(preactivations, is_cls, strict=True)
    ]
    assert together.equal(torch.stack(alone))


# Gradients -----------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_active_alone():
    for sparsifier in (ReluTopK(4, 2, 2), BatchTopK(4, 2, 2)):
        preactivations = TOKENS[:2].clone().requires_grad_()
        activations(sparsifier, preactivations).sum().backward()
        expected = [[1, 1, 0, 1], [0, 0, 0, 1]] if isinstance(sparsifier, BatchTopK) else [[0, 1, 0, 1], [0, 0, 0, 1]]
        assert preactivations.grad.tolist() == expected
    preactivations = TOKENS[:2].clone().requires_grad_()
    activations(AbsTopK(4, 2, 2), preactivations).sum().backward()
    assert preactivations.grad.tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]


def jump_by_hand():
    """Thresholds t = 0.5, 1, 2; one token 0.04 above its first, 0.03 below its second, 0.06 above its third."""
    sparsifier = JumpReLU(3, k=3, k_cls=3).double()
    sparsifier.log_threshold.data = tensor([0.5, 1.0, 2.0], dtype=torch.float64).log()
    return sparsifier, tensor([[0.54, 0.97, 2.06]], dtype=torch.float64, requires_grad=True)


def test_jumprelu_passes_the_papers_pseudo_gradients():
    """arXiv 2407.14435: d/dt JumpReLU = -t/eps K((z - t)/eps), K = 1 within 1/2 of 0; to z, that of z H(z - t)."""
    sparsifier, z = jump_by_hand()
    indices = sparsifier.select(z.detach())
    upstream = tensor([1.0, 10.0, 100.0], dtype=torch.float64)  # of each feature
    values = sparsifier(z.gather(-1, indices), indices, tensor([False]))
    (values * upstream[indices]).sum().backward()
    assert z.grad.tolist() == [[1, 0, 100]]
    by_threshold = [-0.5 / 0.1 * 1, -1.0 / 0.1 * 10, 0]  # 2.06 lies outside the rectangle of width 0.1 around 2
    by_log = [0.5 * by_threshold[0], 1.0 * by_threshold[1], 0]
    assert sparsifier.log_threshold.grad.tolist() == pytest.approx(by_log)


def test_l0_of_a_jumprelu_counts_and_passes_the_papers_pseudo_gradients():
    """arXiv 2407.14435: d/dt H(z - t) = -1/eps K((z - t)/eps), and nothing to z."""
    sparsifier, z = jump_by_hand()
    indices = sparsifier.select(z.detach())
    chosen = z.gather(-1, indices)
    count = sparsifier.active(chosen, indices, chosen)
    assert count.tolist() == [2]
    (3 * count).sum().backward()
    assert z.grad is None
    assert sparsifier.log_threshold.grad.tolist() == pytest.approx([3 * -0.5 / 0.1, 3 * -1.0 / 0.1, 0])


def test_thresholds_gather_gradients_over_tokens():
    sparsifier = JumpReLU(2, k=2, k_cls=2).double()  # both thresholds 0.1
    z = tensor([[0.12, 0.3], [0.08, 0.11]], dtype=torch.float64)
    activations(sparsifier, z).sum().backward()
    assert sparsifier.log_threshold.grad.tolist() == pytest.approx([2 * -0.1 / 0.1 * 0.1, -0.1 / 0.1 * 0.1])


# What serving needs --------------------------------------------------------------------------------------------------


def test_thresholds_for_serving():
    assert ReluTopK(4, 2, 3).inference_threshold() is None
    assert AbsTopK(4, 2, 3).inference_threshold() is None
    assert JumpReLU(4, 2, 3).inference_threshold().tolist() == pytest.approx([0.1] * 4)
    batch = BatchTopK(4, 2, 3)
    assert batch.inference_threshold().tolist() == [0] * 4  # not measured: positive pre-activations are active
    batch.thresholds.copy_(tensor([5.0, 7.0]))
    assert batch.inference_threshold().tolist() == [7] * 4


@pytest.mark.parametrize(("kind", "places"), list(zip(KINDS, (1, 1, 6, 6), strict=True)))
def test_places_of_cls(kind, places):
    sparsifier = make_sparsifier(kind, 8, k=3, k_cls=1)
    assert sparsifier.inference_places() == places
    assert sparsifier.places == (3 if places == 1 else 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "k_cls"), [(0, 1), (1, 0), (5, 1), (1, 5), (-1, 2)])
def test_impossible_budgets_are_refused(kind, k, k_cls):
    with pytest.raises(ValueError, match=f"k = {k} and k_cls = {k_cls} must be between 1 and .* features, 4"):
        make_sparsifier(kind, 4, k, k_cls)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind):
    assert activations(make_sparsifier(kind, 4, 2, 2), torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_tokens_are_selected_as_one_is(threads):
    """More than are selected at a time."""
    values, before = torch.randn(150, 40, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        selected = make_sparsifier("relu_topk", 40, 7, 7).select(values)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(selected, values.topk(7).indices)
