"""The Cross-Layer Transcoder on numbers worked out by hand, its tables and its budgets."""

import pytest
import torch
from torch import tensor

from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.models.dictionary.sparsify import BatchTopK

KINDS = ("relu_topk", "abs_topk", "jumprelu", "batch_topk")


def dense_code(code, features):
    return torch.zeros(len(code.values), features, dtype=code.values.dtype).scatter_add(1, code.indices, code.values)


# By hand -------------------------------------------------------------------------------------------------------------


def by_hand(cross_layer=True):
    """2 layers, width 2, 3 features, k = 2."""
    clt = CrossLayerTranscoder(Architecture(2, 2, 3, (2, 2), (2, 2), cross_layer=cross_layer)).requires_grad_(False)
    clt.encoders[0].weight[:] = tensor([[1, 0], [0, 1], [1, 1]])
    clt.encoders[1].weight[:] = tensor([[2, 0], [0, -1], [0, 1]])
    clt.encoders[0].bias[:] = 0
    clt.encoders[1].bias[:] = tensor([0, 0, 10])
    clt.decoders[0].weights[0][:] = tensor([[1, 2], [3, 4], [5, 6]])  # layer 0 to target 0
    if cross_layer:
        clt.decoders[1].weights[0][:] = tensor([[0, 1], [1, 0], [0, 2]])  # layer 0 to target 1
    clt.decoders[1].weights[-1][:] = tensor([[1, 1], [7, 7], [0, -1]])  # layer 1 to target 1
    clt.decoders[0].bias[:] = tensor([10, 20])
    clt.decoders[1].bias[:] = tensor([30, 40])
    return clt


X, PATCH = tensor([[[1.0, 2.0]], [[4.0, -6.0]]]), tensor([False])


def test_encode_by_hand():
    # pre-activations: 1, 2, 1 + 2 in layer 0; 2 * 4, 6, -6 + 10 in layer 1
    codes = by_hand().encode(X, PATCH)
    assert [dense_code(code, 3).tolist() for code in codes] == [[[0, 2, 3]], [[8, 6, 0]]]


def test_forward_by_hand():
    _, outputs = by_hand()(X, PATCH)
    assert outputs[:, 0].tolist() == [[6 + 15 + 10, 8 + 18 + 20], [2 + 0 + 8 + 42 + 30, 0 + 6 + 8 + 42 + 40]]


def test_per_layer_transcoders_by_hand():
    clt = by_hand(cross_layer=False)
    _, outputs = clt(X, PATCH)
    assert outputs[:, 0].tolist() == [[6 + 15 + 10, 8 + 18 + 20], [8 + 42 + 30, 8 + 42 + 40]]
    assert clt.directions().tolist() == [[[1, 2], [3, 4], [5, 6]], [[1, 1], [7, 7], [0, -1]]]
    assert clt.writers(1).tolist() == [[[0, 0]] * 3, [[1, 1], [7, 7], [0, -1]]]


def test_contributions_by_hand():
    clt = by_hand()
    assert clt.decoders[1].contributions(clt.encode(X, PATCH))[:, 0].tolist() == [[2 + 0, 0 + 6], [8 + 42, 8 + 42]]


def test_directions_by_hand():
    assert by_hand().directions().tolist() == [[[1, 3], [4, 4], [5, 8]], [[1, 1], [7, 7], [0, -1]]]


# Tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross_layer", [True, False])
def test_tables_are_those_of_a_naive_loop(random_clt, cross_layer):
    clt = random_clt(layers=4, cross_layer=cross_layer)
    directions = torch.zeros(4, 7, 4, dtype=torch.float64)
    for target in range(4):
        writers = torch.zeros(4, 7, 4, dtype=torch.float64)
        first = 0 if cross_layer else target
        for source in range(first, target + 1):
            for feature in range(7):
                writers[source, feature] = clt.decoders[target].weights[source - first][feature]
        assert clt.writers(target).equal(writers)
        directions += writers
    torch.testing.assert_close(clt.directions(), directions, rtol=0, atol=1e-14)
    assert clt.decoder_biases().equal(torch.stack([decoder.bias for decoder in clt.decoders]))


@pytest.mark.parametrize("sparsifier", KINDS)
@pytest.mark.parametrize("cross_layer", [True, False])
def test_directions_add_up_what_every_feature_writes(random_clt, random_tokens, sparsifier, cross_layer):
    """Sum over layers of the outputs, minus the biases, is the code times the directions."""
    clt = random_clt(sparsifier=sparsifier, cross_layer=cross_layer)
    x, is_cls, _ = random_tokens(clt, 5)
    codes, outputs = clt(x, is_cls)
    written = sum(dense_code(code, 7) @ table for code, table in zip(codes, clt.directions(), strict=True))
    torch.testing.assert_close(written, (outputs - clt.decoder_biases()[:, None]).sum(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sparsifier", KINDS)
@pytest.mark.parametrize("cross_layer", [True, False])
def test_parameters_are_counted(random_clt, sparsifier, cross_layer):
    clt = random_clt(layers=4, sparsifier=sparsifier, cross_layer=cross_layer)
    assert clt.architecture.parameters == sum(parameter.numel() for parameter in clt.parameters())


def test_initial_weights_are_unit_rows_shared_over_sources_and_seeded():
    clt, again = (CrossLayerTranscoder(Architecture(3, 16, 8, (4, 1, 4), (4, 4, 4))) for _ in range(2))
    clt.initialise(torch.Generator().manual_seed(0))
    again.initialise(torch.Generator().manual_seed(0))
    for target, (encoder, decoder, k) in enumerate(zip(clt.encoders, clt.decoders, (4, 1, 4), strict=True)):
        torch.testing.assert_close(encoder.weight.norm(dim=-1), torch.ones(8))
        for weight in decoder.weights:
            torch.testing.assert_close(weight.norm(dim=-1), torch.full((8,), 1 / ((target + 1) * k**0.5)))
        assert not encoder.bias.any()
        assert not decoder.bias.any()
    assert all(torch.equal(a, b) for a, b in zip(clt.parameters(), again.parameters(), strict=True))


# Budgets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross_layer", [True, False])
def test_budgets_are_those_of_layer_and_token_type(random_clt, random_tokens, cross_layer):
    clt = random_clt(k=(1, 3, 2), k_cls=(4, 1, 2), sparsifier="abs_topk", cross_layer=cross_layer)
    x, is_cls, _ = random_tokens(clt, 9)
    assert 0 < is_cls.sum() < 9
    for code, k, k_cls in zip(clt.encode(x, is_cls), (1, 3, 2), (4, 1, 2), strict=True):
        assert (code.values != 0).sum(-1).equal(torch.where(is_cls, k_cls, k))
        assert code.indices.shape[1] == max(k, k_cls)


@pytest.mark.parametrize(
    ("k", "k_cls", "problem"),
    [
        ((2, 2), (2, 2, 2), "k has 2 numbers for 3 layers"),
        ((2, 2, 2), (2,), "k_cls has 1 numbers for 3 layers"),
        ((2, 0, 2), (2, 2, 2), "k = 0 and k_cls = 2 must be between 1 and the number of features, 7"),
        ((2, 2, 2), (2, 8, 2), "k = 2 and k_cls = 8 must be between 1 and the number of features, 7"),
    ],
)
def test_impossible_budgets_are_refused(k, k_cls, problem):
    with pytest.raises(ValueError, match=problem):
        CrossLayerTranscoder(Architecture(3, 4, 7, k, k_cls))


@pytest.mark.parametrize("changed", [0, 1, 2])
@pytest.mark.parametrize("cross_layer", [True, False])
def test_a_layer_writes_to_itself_and_to_later_ones_alone(random_clt, random_tokens, cross_layer, changed):
    clt = random_clt(cross_layer=cross_layer)
    x, is_cls, _ = random_tokens(clt, 4)
    other = x.clone()
    other[changed] += 1
    (_, before), (_, after) = clt(x, is_cls), clt(other, is_cls)
    for target in range(3):
        reached = target >= changed if cross_layer else target == changed
        assert before[target].equal(after[target]) != reached


def test_batch_topk_thresholds_are_part_of_the_state(random_clt, random_tokens):
    clt = random_clt(sparsifier="batch_topk")
    x, is_cls, _ = random_tokens(clt, 9)
    clt(x, is_cls)
    other = random_clt(sparsifier="batch_topk", seed=5)
    other.load_state_dict(clt.state_dict())
    for encoder in other.encoders:
        assert isinstance(encoder.sparsifier, BatchTopK)
        assert (encoder.sparsifier.thresholds > 0).all()
    clt.eval(), other.eval()
    assert clt(x, is_cls)[1].equal(other(x, is_cls)[1])
