"""The Cross-Layer Transcoder on numbers worked out by hand, and its sparse products against dense autograd."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from models.clt import Architecture, CrossLayerTranscoder, SortedCode, as_codes
from models.sparsify import BatchTopK

KINDS = ("relu_topk", "abs_topk", "jumprelu", "batch_topk")


def make(layers=3, width=4, features=7, k=2, k_cls=None, seed=0, dtype=torch.float64, **architecture):
    """A CLT whose every number is random; k and k_cls: one number, or one a layer."""
    budgets = [(budget,) * layers if isinstance(budget, int) else budget for budget in (k, k_cls or k)]
    clt = CrossLayerTranscoder(Architecture(layers, width, features, *budgets, **architecture)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in clt.named_parameters():
        if name.endswith("log_threshold"):
            torch.nn.init.uniform_(parameter, -3, 0, generator=generator)
        else:
            torch.nn.init.normal_(parameter, generator=generator)
    return clt


def draw(clt, tokens, seed=1):
    """(ln_2 outputs [L, N, d], is_cls [N], a gradient for the outputs [L, N, d])."""
    generator, dtype = torch.Generator().manual_seed(seed), clt.decoders[0].bias.dtype
    x, d_out = (torch.randn(clt.layers, tokens, clt.width, generator=generator, dtype=dtype) for _ in range(2))
    return x, torch.rand(tokens, generator=generator) < 0.4, d_out


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
def test_tables_are_those_of_a_naive_loop(cross_layer):
    clt = make(layers=4, cross_layer=cross_layer)
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
def test_directions_add_up_what_every_feature_writes(sparsifier, cross_layer):
    """Sum over layers of the outputs, minus the biases, is the code times the directions."""
    clt = make(sparsifier=sparsifier, cross_layer=cross_layer)
    x, is_cls, _ = draw(clt, 5)
    codes, outputs = clt(x, is_cls)
    written = sum(dense_code(code, 7) @ table for code, table in zip(codes, clt.directions(), strict=True))
    torch.testing.assert_close(written, (outputs - clt.decoder_biases()[:, None]).sum(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sparsifier", KINDS)
@pytest.mark.parametrize("cross_layer", [True, False])
def test_parameters_are_counted(sparsifier, cross_layer):
    clt = make(layers=4, sparsifier=sparsifier, cross_layer=cross_layer)
    assert clt.architecture.parameters == sum(parameter.numel() for parameter in clt.parameters())


def test_as_codes_fills_narrow_codes_up():
    clt = make(k=(1, 3, 2))
    x, is_cls, _ = draw(clt, 5)
    codes = clt.encode(x, is_cls)
    stacked = as_codes(codes, 4)
    assert stacked.indices.shape == stacked.values.shape == (3, 5, 4)
    for layer, code in enumerate(codes):
        width = code.indices.shape[1]
        assert stacked.indices[layer, :, :width].equal(code.indices)
        assert stacked.values[layer, :, :width].equal(code.values)
        assert not stacked.values[layer, :, width:].any()


def test_as_codes_never_cuts_a_code():
    clt = make(k=(1, 3, 2))
    x, is_cls, _ = draw(clt, 5)
    with pytest.raises(ValueError, match="a code has 3 places, only 2 were asked for"):
        as_codes(clt.encode(x, is_cls), 2)


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
def test_budgets_are_those_of_layer_and_token_type(cross_layer):
    clt = make(k=(1, 3, 2), k_cls=(4, 1, 2), sparsifier="abs_topk", cross_layer=cross_layer)
    x, is_cls, _ = draw(clt, 9)
    assert 0 < is_cls.sum() < 9
    for code, k, k_cls in zip(clt.encode(x, is_cls), (1, 3, 2), (4, 1, 2), strict=True):
        assert (code.values != 0).sum(-1).equal(torch.where(is_cls, k_cls, k))
        assert code.indices.shape[1] == max(k, k_cls)


@pytest.mark.parametrize(
    ("k", "k_cls", "problem"),
    [
        ((2, 2), (2, 2, 2), "k has 2 numbers for 3 layers"),
        ((2, 2, 2), (2,), "k_cls has 1 numbers for 3 layers"),
        ((2, 0, 2), (2, 2, 2), "k = 0 and k_cls = 2 must lie between 1 and the number of features, 7"),
        ((2, 2, 2), (2, 8, 2), "k = 2 and k_cls = 8 must lie between 1 and the number of features, 7"),
    ],
)
def test_impossible_budgets_are_refused(k, k_cls, problem):
    with pytest.raises(ValueError, match=problem):
        CrossLayerTranscoder(Architecture(3, 4, 7, k, k_cls))


@pytest.mark.parametrize("changed", [0, 1, 2])
@pytest.mark.parametrize("cross_layer", [True, False])
def test_a_layer_writes_to_itself_and_to_later_ones_alone(cross_layer, changed):
    clt = make(cross_layer=cross_layer)
    x, is_cls, _ = draw(clt, 4)
    other = x.clone()
    other[changed] += 1
    (_, before), (_, after) = clt(x, is_cls), clt(other, is_cls)
    for target in range(3):
        reached = target >= changed if cross_layer else target == changed
        assert before[target].equal(after[target]) != reached


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
    loss = (outputs * d_out).sum()
    if clt.architecture.sparsifier == "jumprelu":
        sparsifiers = [encoder.sparsifier for encoder in clt.encoders]
        loss = loss + sum(s.l0(c.chosen, c.indices).sum() for s, c in zip(sparsifiers, codes, strict=True))
    return codes, outputs, torch.autograd.grad(loss, inputs, materialize_grads=True)


def check_sparse_is_dense(clt, x, is_cls, d_out, tolerance):
    x = x.clone().requires_grad_()
    inputs = [x, *clt.parameters()]
    found, expected = (run(clt, dense, x, is_cls, d_out, inputs) for dense in (False, True))
    for sparse, dense in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(
            dense_code(sparse, clt.features), dense_code(dense, clt.features), rtol=tolerance, atol=tolerance
        )
    torch.testing.assert_close(found[1:], expected[1:], rtol=tolerance, atol=tolerance)
    assert found[1].dtype == x.dtype
    return found


@settings(deadline=None, max_examples=120)
@given(cases())
def test_sparse_is_dense_with_all_gradients(case):
    arguments, tokens, seed = case
    clt = make(seed=seed, **arguments)
    check_sparse_is_dense(clt, *draw(clt, tokens, seed), tolerance=1e-10)


@pytest.mark.parametrize("sparsifier", KINDS)
@pytest.mark.parametrize("cross_layer", [True, False])
def test_sparse_is_dense_in_float32(sparsifier, cross_layer):
    clt = make(
        width=24, features=96, k=(8, 12, 4), k_cls=(3, 12, 6), sparsifier=sparsifier, cross_layer=cross_layer,
        dtype=torch.float32,
    )  # fmt: skip
    clt.initialise(torch.Generator().manual_seed(0))
    x, is_cls, d_out = draw(clt, 50)
    check_sparse_is_dense(clt, x, is_cls, d_out / 50, tolerance=1e-5)


@pytest.mark.parametrize("sparsifier", KINDS)
@pytest.mark.parametrize("cls", [True, False])
def test_one_token_type_alone(sparsifier, cls):
    clt = make(sparsifier=sparsifier, k=2, k_cls=3)
    x, _, d_out = draw(clt, 5)
    check_sparse_is_dense(clt, x, torch.full((5,), cls), d_out, tolerance=1e-10)


@pytest.mark.parametrize("sparsifier", KINDS)
def test_no_pre_activation_above_zero(sparsifier):
    clt = make(sparsifier=sparsifier)
    with torch.no_grad():
        for encoder in clt.encoders:
            encoder.bias.fill_(-50)
    x, is_cls, d_out = draw(clt, 5)
    codes, outputs, gradients = check_sparse_is_dense(clt, x, is_cls, d_out, tolerance=1e-10)
    if sparsifier == "abs_topk":
        assert all((code.values < 0).all() for code in codes)
    else:
        assert not any(code.values.any() for code in codes)
        torch.testing.assert_close(outputs, clt.decoder_biases()[:, None].expand_as(outputs))
        assert not gradients[0].any()


@pytest.mark.parametrize("sparsifier", KINDS)
def test_equal_pre_activations(sparsifier):
    """Every feature ties with every other; which are taken is open, how many is not."""
    clt = make(sparsifier=sparsifier)
    with torch.no_grad():
        for encoder in clt.encoders:
            encoder.weight.zero_()
            encoder.bias.fill_(2)
    x, is_cls, d_out = draw(clt, 5)
    codes, *_ = check_sparse_is_dense(clt, x, is_cls, d_out, tolerance=1e-10)
    for code in codes:
        expected = 5 * (4 if sparsifier == "jumprelu" else 2)
        assert (code.values != 0).sum() == expected


def test_no_tokens_at_all():
    clt = make()
    x = torch.empty(3, 0, 4, dtype=torch.float64, requires_grad=True)
    _, outputs = clt(x, torch.empty(0, dtype=torch.bool))
    assert outputs.shape == (3, 0, 4)
    outputs.sum().backward()
    assert not any(parameter.grad.any() for parameter in clt.parameters())


def test_gradients_of_the_whole_clt_are_those_of_finite_differences():
    """Of the smooth parts: not of the thresholds, whose gradients are pseudo-gradients."""
    clt = make(layers=2, width=3, features=4, k=2, k_cls=1, sparsifier="abs_topk")
    x, is_cls, _ = draw(clt, 3)
    names, parameters = zip(*clt.named_parameters(), strict=True)

    def outputs(x, *parameters):
        return torch.func.functional_call(clt, dict(zip(names, parameters, strict=True)), (x, is_cls))[1]

    assert torch.autograd.gradcheck(outputs, (x.requires_grad_(), *parameters))


def test_gradients_that_are_not_contiguous():
    clt = make()
    x, is_cls, _ = draw(clt, 4)
    ones = torch.ones((), dtype=torch.float64).expand(3, 4, 4)  # stride 0, as `.sum().backward()` makes it
    transposed = draw(clt, 4, seed=5)[2].transpose(1, 2)  # [L, d, N] with d = N: strides of another order
    for d_out in (ones, transposed):
        check_sparse_is_dense(clt, x, is_cls, d_out, tolerance=1e-10)


def test_inputs_that_are_not_contiguous():
    """One token of each image, as when [CLS] alone is read."""
    clt = make()
    x, is_cls, d_out = draw(clt, 6)
    images = x.unflatten(1, (3, 2))  # [L, B, T, d]
    cut = images[:, :, 0].detach().requires_grad_()
    assert not cut.is_contiguous()
    found, expected = (run(clt, dense, cut, is_cls[:3], d_out[:, :3], [cut, *clt.parameters()]) for dense in (0, 1))
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-10, atol=1e-10)


# Which gradients are wanted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted", ["x", "encoders", "decoders", "encoders.0.bias", "encoders.1.weight", "decoders.2.weights.0"]
)
@pytest.mark.parametrize("sparsifier", ["relu_topk", "jumprelu"])
def test_any_part_may_be_frozen(wanted, sparsifier):
    """A cascade with a frozen CLT wants the gradient of x alone; fine-tuning the decoders, theirs alone."""
    clt = make(sparsifier=sparsifier)
    x, is_cls, d_out = draw(clt, 5)
    for name, parameter in clt.named_parameters():
        parameter.requires_grad_(name.startswith(wanted))
    inputs = [x.requires_grad_()] if wanted == "x" else [p for p in clt.parameters() if p.requires_grad]
    assert inputs
    *_, found = run(clt, False, x, is_cls, d_out, inputs)
    *_, expected = run(clt, True, x, is_cls, d_out, inputs)
    assert any(gradient.any() for gradient in expected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_codes_are_sorted_when_a_gradient_asks_for_it_and_once(monkeypatch):
    clt, sorts = make(), []
    x, is_cls, _ = draw(clt, 5)
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


def test_a_code_made_by_hand_needs_no_order():
    clt = make(layers=1)
    indices, values = tensor([[0, 3], [3, 6]]), torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    code = SortedCode(indices, values, values, None)
    inputs = [values, *clt.decoders[0].parameters()]
    found = torch.autograd.grad(clt.decode([code]).square().sum(), inputs)
    expected = torch.autograd.grad(clt.decoders[0].decode_dense([code]).square().sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_second_derivatives_are_refused_not_wrong():
    clt = make()
    x, is_cls, _ = draw(clt, 2)
    (gradient,) = torch.autograd.grad(clt(x.requires_grad_(), is_cls)[1].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_kept(dtype):
    clt = make(dtype=dtype)
    x, is_cls, _ = draw(clt, 3)
    codes, outputs = clt(x, is_cls)
    assert {outputs.dtype, *(tensor.dtype for code in codes for tensor in (code.values, code.chosen))} == {dtype}
    code, dense = codes[0], clt.encoders[0].encode_dense(x[0], is_cls)
    torch.testing.assert_close(code.values, dense.values, rtol=0, atol=1e-15 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("sparsifier", KINDS)
@pytest.mark.parametrize("half_inputs", [False, True])
def test_under_autocast_all_is_right_to_the_precision_of_bfloat16(sparsifier, half_inputs):
    """The encoders' product is made in bfloat16; values, outputs and gradients are float32."""
    clt = make(width=24, features=32, k=6, k_cls=4, sparsifier=sparsifier, dtype=torch.float32)
    clt.initialise(torch.Generator().manual_seed(0))
    x, is_cls, d_out = draw(clt, 20)
    x = (x.bfloat16() if half_inputs else x).requires_grad_()
    inputs = [x, *clt.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        codes, outputs = clt(x, is_cls)
    assert {tensor.dtype for code in codes for tensor in (code.values, code.chosen)} == {torch.float32}
    assert outputs.dtype == torch.float32
    found = torch.autograd.grad((outputs * d_out).sum(), inputs)

    wide = deepcopy(clt).double()
    x = x.detach().double().requires_grad_()
    product = [encoder._preactivations(tokens) for encoder, tokens in zip(wide.encoders, x, strict=True)]
    # The same features: which they are, bfloat16 may decide otherwise where two are close.
    exact = [a.gather(-1, code.indices) for a, code in zip(product, codes, strict=True)]
    values = [chosen.where(code.values != 0, 0.0) for chosen, code in zip(exact, codes, strict=True)]
    for code, value in zip(codes, values, strict=True):
        torch.testing.assert_close(code.values.double(), value, rtol=2**-7, atol=2**-5)
    again = [SortedCode(code.indices, value, value, None) for code, value in zip(codes, values, strict=True)]
    expected_outputs = torch.stack([decoder.decode_dense(again) for decoder in wide.decoders])
    torch.testing.assert_close(outputs.double(), expected_outputs, rtol=2**-6, atol=2**-6)
    smooth = [(x, found[0])] + [
        (parameter, gradient)
        for (name, parameter), gradient in zip(wide.named_parameters(), found[1:], strict=True)
        if not name.endswith("log_threshold")  # tested by hand in test_sparsify
    ]
    expected = torch.autograd.grad((expected_outputs * d_out).sum(), [tensor for tensor, _ in smooth])
    for (_, gradient), reference in zip(smooth, expected, strict=True):
        off = (gradient.double() - reference).norm() / reference.norm()
        assert off < 2**-6
    assert found[1].dtype == torch.float32
    assert found[0].dtype == (torch.bfloat16 if half_inputs else torch.float32)


def test_batch_topk_thresholds_are_part_of_the_state():
    clt = make(sparsifier="batch_topk")
    x, is_cls, _ = draw(clt, 9)
    clt(x, is_cls)
    other = make(sparsifier="batch_topk", seed=5)
    other.load_state_dict(clt.state_dict())
    for encoder in other.encoders:
        assert isinstance(encoder.sparsifier, BatchTopK)
        assert (encoder.sparsifier.thresholds > 0).all()
    clt.eval(), other.eval()
    assert clt(x, is_cls)[1].equal(other(x, is_cls)[1])
