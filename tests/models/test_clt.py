"""The Cross-Layer Transcoder on numbers worked out by hand, and its sparse decoding against dense autograd."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.clt import CrossLayerTranscoder
from models.sparsify import Code, relu_topk


def test_relu_topk_by_hand():
    preactivations = torch.tensor([[0.5, 3.0, -1.0, 2.0], [-4.0, -3.0, -2.0, 1.0]])
    code = relu_topk(preactivations, 2)
    dense = torch.zeros(2, 4).scatter_add(-1, code.indices, code.values)
    assert dense.tolist() == [[0, 3, 0, 2], [0, 0, 0, 1]]  # the second token has one positive feature, not two


def test_relu_topk_with_k_of_all_features_is_relu():
    preactivations = torch.tensor([1.0, -2.0, 0.0, 4.0])
    code = relu_topk(preactivations, 4)
    assert torch.zeros(4).scatter_add(-1, code.indices, code.values).tolist() == [1, 0, 0, 4]


@pytest.fixture
def by_hand():
    """2 layers, width 2, 3 features, k = 2."""
    clt = CrossLayerTranscoder(layers=2, width=2, features=3, k=2).requires_grad_(False)
    clt.w_enc[0] = torch.tensor([[1, 0], [0, 1], [1, 1]])
    clt.w_enc[1] = torch.tensor([[2, 0], [0, -1], [0, 1]])
    clt.b_enc[1] = torch.tensor([0, 0, 10])
    clt.w_dec[0][0] = torch.tensor([[1, 2], [3, 4], [5, 6]])  # layer 0 to target 0
    clt.w_dec[1][0] = torch.tensor([[0, 1], [1, 0], [0, 2]])  # layer 0 to target 1
    clt.w_dec[1][1] = torch.tensor([[1, 1], [7, 7], [0, -1]])  # layer 1 to target 1
    clt.b_dec[:] = torch.tensor([[10, 20], [30, 40]])
    return clt


def test_encode_by_hand(by_hand):
    # pre-activations: 1, 2, 1 + 2 in layer 0; 2 * 4, 6, -6 + 10 in layer 1
    code = by_hand.encode(torch.tensor([[[1.0, 2.0]], [[4.0, -6.0]]]))
    dense = torch.zeros(2, 1, 3).scatter_add(-1, code.indices, code.values)
    assert dense[:, 0].tolist() == [[0, 2, 3], [8, 6, 0]]


def test_decode_by_hand(by_hand):
    code = Code(torch.tensor([[[1, 2]], [[0, 1]]]), torch.tensor([[[2.0, 3.0]], [[8.0, 0.0]]]))
    expected = [
        [2 * 3 + 3 * 5 + 10, 2 * 4 + 3 * 6 + 20],
        [2 * 1 + 3 * 0 + 8 * 1 + 30, 2 * 0 + 3 * 2 + 8 * 1 + 40],
    ]
    assert by_hand.decode(code)[:, 0].tolist() == expected
    assert by_hand.decode_dense(code)[:, 0].tolist() == expected


def test_forward_by_hand(by_hand):
    outputs = by_hand(torch.tensor([[[1.0, 2.0]], [[4.0, -6.0]]]))
    assert outputs[:, 0].tolist() == [[6 + 15 + 10, 8 + 18 + 20], [2 + 0 + 8 + 42 + 30, 0 + 6 + 8 + 42 + 40]]


def test_directions_by_hand(by_hand):
    assert by_hand.directions().tolist() == [[[1, 3], [4, 4], [5, 8]], [[1, 1], [7, 7], [0, -1]]]


def test_directions_add_up_what_every_feature_writes(clt):
    """Sum over layers of decode, minus the biases, is the code times the directions."""
    mlp_in = torch.randn(clt.layers, 5, clt.width, generator=torch.Generator().manual_seed(2))
    code = clt.encode(mlp_in)
    dense = torch.zeros(clt.layers, 5, clt.features).scatter_add(-1, code.indices, code.values)
    written = torch.einsum("lnf,lfd->nd", dense, clt.directions())
    torch.testing.assert_close(written, (clt.decode(code) - clt.b_dec[:, None]).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_layer_never_writes_to_an_earlier_one(clt, changed):
    mlp_in = torch.randn(clt.layers, 4, clt.width, generator=torch.Generator().manual_seed(3))
    other = mlp_in.clone()
    other[changed] += 1
    before, after = clt(mlp_in), clt(other)
    torch.testing.assert_close(before[:changed], after[:changed], rtol=0, atol=0)
    for target in range(changed, clt.layers):
        assert not torch.allclose(before[target], after[target])


@pytest.mark.parametrize("k", [0, 4])
def test_impossible_k_is_refused(k):
    with pytest.raises(ValueError, match=f"k = {k} must lie between 1 and the number of features, 3"):
        CrossLayerTranscoder(layers=1, width=2, features=3, k=k)


def test_initial_weights_are_unit_rows_shared_over_sources_and_seeded():
    clt = CrossLayerTranscoder(layers=3, width=16, features=8, k=4)
    clt.initialise(torch.Generator().manual_seed(0))
    torch.testing.assert_close(clt.w_enc.norm(dim=-1), torch.ones(3, 8))
    for target, w_dec in enumerate(clt.w_dec):
        torch.testing.assert_close(w_dec.norm(dim=-1), torch.full((target + 1, 8), 1 / ((target + 1) * 2)))
    again = CrossLayerTranscoder(layers=3, width=16, features=8, k=4)
    again.initialise(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(clt.parameters(), again.parameters(), strict=True))


@st.composite
def codes(draw):
    """(a float64 CLT, a code for it, a gradient for its outputs); features repeat over tokens, some never fire."""
    layers, width, features = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 7))
    k, tokens = draw(st.integers(1, features)), draw(st.integers(1, 6))
    used = draw(st.integers(k, features))  # only the first `used` features are ever active
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    clt = CrossLayerTranscoder(layers, width, features, k).double()
    for parameter in clt.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    indices = torch.rand(layers, tokens, used, generator=generator).argsort(-1)[..., :k]
    values = torch.randn(layers, tokens, k, generator=generator, dtype=torch.float64).relu()  # zeros: unused places
    return clt, indices, values, torch.randn(layers, tokens, width, generator=generator, dtype=torch.float64)


def _outputs_and_gradients(decode, clt, indices, values, d_out):
    values = values.clone().requires_grad_()
    outputs = decode(Code(indices, values))
    return outputs, torch.autograd.grad(outputs, [values, *clt.w_dec, clt.b_dec], d_out)


@settings(deadline=None, max_examples=100)
@given(codes())
def test_sparse_decode_is_dense_decode_with_all_gradients(drawn):
    clt, *rest = drawn
    sparse, sparse_gradients = _outputs_and_gradients(clt.decode, clt, *rest)
    dense, dense_gradients = _outputs_and_gradients(clt.decode_dense, clt, *rest)
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sparse_gradients, dense_gradients, rtol=1e-10, atol=1e-10)


def test_gradients_of_the_whole_clt_are_those_of_finite_differences():
    clt = CrossLayerTranscoder(layers=2, width=3, features=4, k=2).double()
    clt.initialise(torch.Generator().manual_seed(0))
    mlp_in = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*clt.named_parameters(), strict=True)

    def outputs(mlp_in, *parameters):
        return torch.func.functional_call(clt, dict(zip(names, parameters, strict=True)), (mlp_in,))

    assert torch.autograd.gradcheck(outputs, (mlp_in, *parameters))


def test_sparse_decode_takes_a_gradient_that_is_not_contiguous(clt):
    clt = deepcopy(clt).requires_grad_()
    code = clt.encode(torch.randn(clt.layers, 4, clt.width, generator=torch.Generator().manual_seed(4)))
    d_out = torch.ones(()).expand(clt.layers, 4, clt.width)  # stride 0, as `.sum().backward()` makes it
    sparse = torch.autograd.grad(clt.decode(code), list(clt.w_dec), d_out)
    dense = torch.autograd.grad(clt.decode_dense(code), list(clt.w_dec), d_out)
    torch.testing.assert_close(sparse, dense)
