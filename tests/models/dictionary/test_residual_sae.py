"""The residual SAEs against hand-computed numbers, and against dense products in float64."""

import pytest
import torch

from vitrine.models.dictionary.residual_sae import EPSILON, ResidualSaes, SaeArchitecture, standardise

SPARSIFIERS = ("relu_topk", "abs_topk", "jumprelu", "batch_topk")


def make_saes(sparsifier="relu_topk", features=(12, 24), k=(3, 5), k_cls=(4, 2), width=8, seed=0):
    saes = ResidualSaes(SaeArchitecture(width, features, k, k_cls, sparsifier))
    generator = torch.Generator().manual_seed(seed)
    saes.initialise(generator)
    with torch.no_grad():
        for encoder, decoder in zip(saes.encoders, saes.decoders, strict=True):
            encoder.weight.add_(0.1 * torch.randn(encoder.weight.shape, generator=generator))
            encoder.bias.normal_(std=0.2, generator=generator)
            decoder.bias.normal_(std=0.2, generator=generator)
    return saes


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def test_tokens_are_standardised_each_by_itself():
    x = torch.tensor([[1.0, 3.0], [0.0, 40.0]])
    found = standardise(x)
    deviation = torch.tensor([[2.0], [800.0]]).sqrt()  # unbiased: the sum of squared deviations, 2 and 800, by 2 - 1
    torch.testing.assert_close(found.mean, torch.tensor([[2.0], [20.0]]))
    torch.testing.assert_close(found.scale, deviation + EPSILON)
    torch.testing.assert_close(found.x, torch.tensor([[-1.0, 1.0], [-20.0, 20.0]]) / (deviation + EPSILON))
    torch.testing.assert_close(found.undone(found.x), x)


def test_a_token_of_equal_channels_is_zero():
    assert not standardise(torch.full((2, 5), 7.0)).x.any()


def test_one_token_by_hand():
    """Two features of a width of 2: the token (1, 3) is (-1, 1) / sqrt 2 once standardised."""
    saes = ResidualSaes(SaeArchitecture(2, (2,), (1,), (1,)))
    encoder, decoder = saes.encoders[0], saes.decoders[0]
    with torch.no_grad():
        encoder.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        encoder.bias.copy_(torch.tensor([5.0, 0.25]))
        decoder.weight.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
        decoder.bias.copy_(torch.tensor([0.1, -0.1]))
    code, out = saes.eval().reconstruct(0, torch.tensor([[1.0, 3.0]]), torch.tensor([False]))
    half = 0.5**0.5
    assert code.indices.tolist() == [[0]]
    assert code.values.item() == pytest.approx(5 - half, abs=1e-4)
    expected = torch.tensor([[5 - half + 0.1, -0.1]]) * 2**0.5 + 2
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
def test_sparse_products_equal_dense_ones_with_their_gradients(sparsifier):
    saes = make_saes(sparsifier).double().train()
    is_cls = torch.arange(20) % 5 == 0
    x = standardise(tokens(2, 20, 8).double()).x
    results = []
    for dense in (False, True):
        saes.zero_grad()
        if sparsifier == "batch_topk":
            for encoder in saes.encoders:
                encoder.sparsifier.thresholds.fill_(-1)
        total = torch.zeros((), dtype=torch.float64)
        outs = []
        for layer, (encoder, decoder) in enumerate(zip(saes.encoders, saes.decoders, strict=True)):
            code = encoder.encode_dense(x[layer], is_cls) if dense else encoder(x[layer], is_cls)
            outs.append(decoder.decode_dense(code) if dense else decoder(code))
            total = total + (outs[-1] - x[layer]).square().sum()
        total.backward()
        grads = [p.grad.clone() for p in saes.parameters() if p.grad is not None]
        results.append((outs, grads))
    assert len(results[0][1]) == len(results[1][1]) > 0
    for ours, reference in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sparsifier", ["relu_topk", "abs_topk"])
def test_budgets_differ_by_layer_and_token_type(sparsifier):
    saes = make_saes(sparsifier).eval()
    with torch.no_grad():
        for encoder in saes.encoders:
            encoder.bias.fill_(10.0)  # all are positive, so that budgets alone decide
    is_cls = torch.arange(10) % 5 == 0
    codes, _ = saes(standardise(tokens(2, 10, 8)).x, is_cls)
    for code, k, k_cls in zip(codes, (3, 5), (4, 2), strict=True):
        assert ((code.values != 0).sum(1) == torch.where(is_cls, k_cls, k)).all()


def test_training_begins_tied_at_the_mean_of_the_tokens():
    saes = ResidualSaes(SaeArchitecture(8, (12, 24), (3, 5), (3, 5), "jumprelu"))
    saes.initialise(torch.Generator().manual_seed(1))
    x = standardise(tokens(2, 200, 8) + torch.arange(8.0)).x
    saes.calibrate(x)
    is_cls = torch.zeros(200, dtype=torch.bool)
    codes, _ = saes.eval()(x, is_cls)
    for layer, (encoder, decoder) in enumerate(zip(saes.encoders, saes.decoders, strict=True)):
        assert torch.equal(encoder.weight, decoder.weight)
        torch.testing.assert_close(decoder.weight.norm(dim=-1), torch.ones(saes.architecture.features[layer]))
        torch.testing.assert_close(decoder.bias, x[layer].mean(0))
        # The paper reads the token less the decoder's bias.
        read = (x[layer] - decoder.bias) @ encoder.weight.T
        torch.testing.assert_close(x[layer] @ encoder.weight.T + encoder.bias, read, atol=1e-5, rtol=1e-5)
        active = codes[layer].active.mean().item()
        assert active == pytest.approx(saes.architecture.k[layer], rel=0.1)  # places are limited, thresholds are not


def test_rows_are_renormalised():
    saes = make_saes()
    with torch.no_grad():
        before = saes.decoders[1].weight.mul_(3.0).clone()
    saes.renormalise()
    torch.testing.assert_close(saes.decoders[1].weight, before / before.norm(dim=-1, keepdim=True))


def test_number_of_parameters():
    for sparsifier in SPARSIFIERS:
        saes = make_saes(sparsifier)
        assert saes.architecture.parameters == sum(p.numel() for p in saes.parameters())


def test_budgets_of_another_number_of_layers_are_refused():
    with pytest.raises(ValueError, match="k_cls has 1 numbers for 2 SAEs"):
        SaeArchitecture(8, (12, 24), (3, 5), (4,))
