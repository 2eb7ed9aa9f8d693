"""The CLT's sparse products and their gradients, against dense autograd in float64, float32 and under autocast."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.nn.functional import linear

from vitrine.models.dictionary.sparse_products import SortedCode

KINDS = ("relu_topk", "abs_topk", "jumprelu", "batch_topk")


def dense_code(code, features):
    return torch.zeros(len(code.values), features, dtype=code.values.dtype).scatter_add(1, code.indices, code.values)


# Sparse against dense ------------------------------------------------------------------------------------------------


@st.composite
def cases(draw_from):
    """(keyword arguments of `make`, number of tokens, seed)."""
    layers, features = draw_from(st.integers(1, 3)), draw_from(st.integers(1, 9))
    budget = st.lists(st.integers(1, features), min_size=layers, max_size=layers).map(tuple)
    arguments = {
        "layers": layers,
        "features": features,
        "width": draw_from(st.integers(1, 4)),
        "k": draw_from(budget),
        "k_cls": draw_from(budget),
        "sparsifier": draw_from(st.sampled_from(KINDS)),
        "cross_layer": draw_from(st.booleans()),
    }
    return arguments, draw_from(st.integers(1, 6)), draw_from(st.integers(0, 2**32 - 1))


def run(clt, dense, x, is_cls, d_out, inputs):
    """(codes, outputs, gradients of `inputs`) by the sparse or the dense products; the thresholds' l0 included."""
    if dense:
        codes = [encoder.encode_dense(tokens, is_cls) for encoder, tokens in zip(clt.encoders, x, strict=True)]
        outputs = torch.stack([decoder.decode_dense(codes) for decoder in clt.decoders])
    else:
        codes, outputs = clt(x, is_cls)
    ends = {outputs: d_out}
    if clt.architecture.sparsifier == "jumprelu":
        counts = [code.active for code in codes]
        ends |= {count: torch.ones_like(count) for count in counts if count.requires_grad}
    return codes, outputs, torch.autograd.grad([*ends], inputs, [*ends.values()], materialize_grads=True)


def check_sparse_is_dense(clt, x, is_cls, d_out, tolerance):
    x = x.clone().requires_grad_()
    inputs = [x, *clt.parameters()]
    actual, expected = (run(clt, dense, x, is_cls, d_out, inputs) for dense in (False, True))
    for sparse, dense in zip(actual[0], expected[0], strict=True):
        torch.testing.assert_close(
            dense_code(sparse, clt.features), dense_code(dense, clt.features), rtol=tolerance, atol=tolerance
        )
    torch.testing.assert_close(actual[1:], expected[1:], rtol=tolerance, atol=tolerance)
    assert actual[1].dtype == x.dtype
    return actual


@settings(deadline=None, max_examples=120)
@given(cases())
def test_sparse_is_dense_with_all_gradients(random_clt, random_tokens, case):
    arguments, tokens, seed = case
    clt = random_clt(seed=seed, **arguments)
    check_sparse_is_dense(clt, *random_tokens(clt, tokens, seed), tolerance=1e-10)


@pytest.mark.parametrize("sparsifier", KINDS)
@pytest.mark.parametrize("cross_layer", [True, False])
def test_sparse_is_dense_in_float32(random_clt, random_tokens, sparsifier, cross_layer):
    clt = random_clt(
        width=24, features=96, k=(8, 12, 4), k_cls=(3, 12, 6), sparsifier=sparsifier, cross_layer=cross_layer,
        dtype=torch.float32,
    )  # fmt: skip
    clt.initialise(torch.Generator().manual_seed(0))
    x, is_cls, d_out = random_tokens(clt, 50)
    check_sparse_is_dense(clt, x, is_cls, d_out / 50, tolerance=1e-5)


@pytest.mark.parametrize("sparsifier", KINDS)
@pytest.mark.parametrize("cls", [True, False])
def test_one_token_type_alone(random_clt, random_tokens, sparsifier, cls):
    clt = random_clt(sparsifier=sparsifier, k=2, k_cls=3)
    x, _, d_out = random_tokens(clt, 5)
    check_sparse_is_dense(clt, x, torch.full((5,), cls), d_out, tolerance=1e-10)


@pytest.mark.parametrize("sparsifier", KINDS)
def test_no_pre_activation_above_zero(random_clt, random_tokens, sparsifier):
    clt = random_clt(sparsifier=sparsifier)
    with torch.no_grad():
        for encoder in clt.encoders:
            encoder.bias.fill_(-50)
    x, is_cls, d_out = random_tokens(clt, 5)
    codes, outputs, gradients = check_sparse_is_dense(clt, x, is_cls, d_out, tolerance=1e-10)
    if sparsifier == "abs_topk":
        assert all((code.values < 0).all() for code in codes)
    else:
        assert not any(code.values.any() for code in codes)
        torch.testing.assert_close(outputs, clt.decoder_biases()[:, None].expand_as(outputs))
        assert not gradients[0].any()


@pytest.mark.parametrize("sparsifier", KINDS)
def test_equal_pre_activations(random_clt, random_tokens, sparsifier):
    """All features tie: which are chosen is unspecified, but not how many."""
    clt = random_clt(sparsifier=sparsifier)
    with torch.no_grad():
        for encoder in clt.encoders:
            encoder.weight.zero_()
            encoder.bias.fill_(2)
    x, is_cls, d_out = random_tokens(clt, 5)
    codes, *_ = check_sparse_is_dense(clt, x, is_cls, d_out, tolerance=1e-10)
    for code in codes:
        expected = 5 * (4 if sparsifier == "jumprelu" else 2)
        assert (code.values != 0).sum() == expected


def test_no_tokens_at_all(random_clt):
    clt = random_clt()
    x = torch.empty(3, 0, 4, dtype=torch.float64, requires_grad=True)
    _, outputs = clt(x, torch.empty(0, dtype=torch.bool))
    assert outputs.shape == (3, 0, 4)
    outputs.sum().backward()
    assert not any(parameter.grad.any() for parameter in clt.parameters())


def test_gradients_of_the_whole_clt_are_those_of_finite_differences(random_clt, random_tokens):
    """For the smooth parts only: the thresholds have pseudo-gradients."""
    clt = random_clt(layers=2, width=3, features=4, k=2, k_cls=1, sparsifier="abs_topk")
    x, is_cls, _ = random_tokens(clt, 3)
    names, parameters = zip(*clt.named_parameters(), strict=True)

    def outputs(x, *parameters):
        return torch.func.functional_call(clt, dict(zip(names, parameters, strict=True)), (x, is_cls))[1]

    assert torch.autograd.gradcheck(outputs, (x.requires_grad_(), *parameters))


def test_gradients_that_are_not_contiguous(random_clt, random_tokens):
    clt = random_clt()
    x, is_cls, _ = random_tokens(clt, 4)
    ones = torch.ones((), dtype=torch.float64).expand(3, 4, 4)  # stride 0, as from `.sum().backward()`
    transposed = random_tokens(clt, 4, seed=5)[2].transpose(1, 2)  # [L, d, N] with d = N: strides of another order
    for d_out in (ones, transposed):
        check_sparse_is_dense(clt, x, is_cls, d_out, tolerance=1e-10)


def test_inputs_that_are_not_contiguous(random_clt, random_tokens):
    """One token per image, as when only [CLS] is read."""
    clt = random_clt()
    x, is_cls, d_out = random_tokens(clt, 6)
    images = x.unflatten(1, (3, 2))  # [L, B, T, d]
    cut = images[:, :, 0].detach().requires_grad_()
    assert not cut.is_contiguous()
    actual, expected = (run(clt, dense, cut, is_cls[:3], d_out[:, :3], [cut, *clt.parameters()]) for dense in (0, 1))
    torch.testing.assert_close(actual[1:], expected[1:], rtol=1e-10, atol=1e-10)


# Which gradients are requested ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted", ["x", "encoders", "decoders", "encoders.0.bias", "encoders.1.weight", "decoders.2.weights.0"]
)
@pytest.mark.parametrize("sparsifier", ["relu_topk", "jumprelu"])
def test_any_part_may_be_frozen(random_clt, random_tokens, wanted, sparsifier):
    """A cascade with a frozen CLT needs only the gradient of x; fine-tuning the decoders needs only theirs."""
    clt = random_clt(sparsifier=sparsifier)
    x, is_cls, d_out = random_tokens(clt, 5)
    for name, parameter in clt.named_parameters():
        parameter.requires_grad_(name.startswith(wanted))
    inputs = [x.requires_grad_()] if wanted == "x" else [p for p in clt.parameters() if p.requires_grad]
    assert inputs
    *_, gradients = run(clt, False, x, is_cls, d_out, inputs)
    *_, expected = run(clt, True, x, is_cls, d_out, inputs)
    assert any(gradient.any() for gradient in expected)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10)


def test_codes_are_sorted_when_a_gradient_asks_for_it_and_once(random_clt, random_tokens, monkeypatch):
    clt, sorts = random_clt(), []
    x, is_cls, _ = random_tokens(clt, 5)
    sort = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, **options: sorts.append(0) or sort(self, **options))
    _, outputs = clt(x, is_cls)
    assert not sorts
    outputs.sum().backward()
    assert len(sorts) == 3  # one a layer, for its encoder and all its decoders
    with torch.no_grad():
        clt(x, is_cls)
    frozen = deepcopy(clt).requires_grad_(False)
    frozen(x.requires_grad_(), is_cls)[1].sum().backward()
    assert x.grad.any()
    assert len(sorts) == 3


def test_a_code_made_by_hand_needs_no_order(random_clt):
    clt = random_clt(layers=1)
    indices, values = tensor([[0, 3], [3, 6]]), torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    code = SortedCode(indices, values, values, None)
    inputs = [values, *clt.decoders[0].parameters()]
    gradients = torch.autograd.grad(clt.decode([code]).square().sum(), inputs)
    expected = torch.autograd.grad(clt.decoders[0].decode_dense([code]).square().sum(), inputs)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10)


def test_second_derivatives_are_refused_not_wrong(random_clt, random_tokens):
    clt = random_clt()
    x, is_cls, _ = random_tokens(clt, 2)
    (gradient,) = torch.autograd.grad(clt(x.requires_grad_(), is_cls)[1].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_kept(random_clt, random_tokens, dtype):
    clt = random_clt(dtype=dtype)
    x, is_cls, _ = random_tokens(clt, 3)
    codes, outputs = clt(x, is_cls)
    assert {outputs.dtype, *(tensor.dtype for code in codes for tensor in (code.values, code.active))} == {dtype}
    code, dense = codes[0], clt.encoders[0].encode_dense(x[0], is_cls)
    torch.testing.assert_close(code.values, dense.values, rtol=0, atol=1e-15 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("sparsifier", KINDS)
@pytest.mark.parametrize("half_inputs", [False, True])
def test_under_autocast_all_is_right_to_the_precision_of_bfloat16(random_clt, random_tokens, sparsifier, half_inputs):
    """The encoders' product is computed in bfloat16; values, outputs and gradients are float32."""
    clt = random_clt(width=24, features=32, k=6, k_cls=4, sparsifier=sparsifier, dtype=torch.float32)
    clt.initialise(torch.Generator().manual_seed(0))
    x, is_cls, d_out = random_tokens(clt, 20)
    x = (x.bfloat16() if half_inputs else x).requires_grad_()
    inputs = [x, *clt.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        codes, outputs = clt(x, is_cls)
    assert {tensor.dtype for code in codes for tensor in (code.values, code.active)} == {torch.float32}
    assert outputs.dtype == torch.float32
    gradients = torch.autograd.grad((outputs * d_out).sum(), inputs)

    wide = deepcopy(clt).double()
    x = x.detach().double().requires_grad_()
    product = [linear(tokens, encoder.weight, encoder.bias) for encoder, tokens in zip(wide.encoders, x, strict=True)]
    # For the same features: bfloat16 may select others where two are close.
    exact = [a.gather(-1, code.indices) for a, code in zip(product, codes, strict=True)]
    values = [chosen.where(code.values != 0, 0.0) for chosen, code in zip(exact, codes, strict=True)]
    for code, value in zip(codes, values, strict=True):
        torch.testing.assert_close(code.values.double(), value, rtol=2**-7, atol=2**-5)
    exact_codes = [SortedCode(code.indices, value, value, None) for code, value in zip(codes, values, strict=True)]
    expected_outputs = torch.stack([decoder.decode_dense(exact_codes) for decoder in wide.decoders])
    torch.testing.assert_close(outputs.double(), expected_outputs, rtol=2**-6, atol=2**-6)
    smooth = [(x, gradients[0])] + [
        (parameter, gradient)
        for (name, parameter), gradient in zip(wide.named_parameters(), gradients[1:], strict=True)
        if not name.endswith("log_threshold")  # tested by hand in test_sparsify
    ]
    expected = torch.autograd.grad((expected_outputs * d_out).sum(), [tensor for tensor, _ in smooth])
    for (_, gradient), reference in zip(smooth, expected, strict=True):
        difference = (gradient.double() - reference).norm() / reference.norm()
        assert difference < 2**-6
    assert gradients[1].dtype == torch.float32
    assert gradients[0].dtype == (torch.bfloat16 if half_inputs else torch.float32)
