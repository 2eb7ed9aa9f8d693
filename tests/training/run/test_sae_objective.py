"""The losses of residual SAEs, against float64 loops over tokens and SAEs, and the steps of their trainer."""

import pytest
import torch

from vitrine.models.dictionary.residual_sae import ResidualSaes, SaeArchitecture, standardise
from vitrine.training.data.activations import Residuals
from vitrine.training.recipes.recipe import ResidualSaeSection, TrainingSection
from vitrine.training.run.objective import StepSize
from vitrine.training.run.parallel import make_fabric
from vitrine.training.run.sae_objective import SaeReconstruction, token_variance
from vitrine.training.run.trainer import Trainer

SAES, WIDTH, FEATURES, TOKENS, IMAGES = 2, 6, (7, 10), 4, 5
COUNT = IMAGES * TOKENS


def make(sparsifier="relu_topk", dead_features=2, **settings):
    """(objective on random SAEs, batch of 5 images of 4 tokens), float64."""
    generator = torch.Generator().manual_seed(0)
    saes = ResidualSaes(SaeArchitecture(WIDTH, FEATURES, (3, 2), (2, 4), sparsifier))
    saes.initialise(generator)
    for parameter in saes.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    stream = (3 * torch.randn(SAES, COUNT, WIDTH, generator=generator) + 1).double()
    batch = Residuals(stream, torch.arange(COUNT) % TOKENS == 0)
    section = ResidualSaeSection(features=FEATURES, k=3, dead_features=dead_features, dead_weight=0.25)
    variance = torch.tensor([0.9, 0.8], dtype=torch.float64)
    saes = saes.double()
    return SaeReconstruction(saes, variance, section, TrainingSection(**settings), StepSize(IMAGES, TOKENS)), batch


def dense(objective, batch):
    """(what the SAEs miss [S, N, d], codes), by dense products."""
    saes, x = objective.dictionary, standardise(batch.stream).x
    codes = [encoder.encode_dense(x[layer], batch.is_cls) for layer, encoder in enumerate(saes.encoders)]
    outputs = [decoder.decode_dense(code) for decoder, code in zip(saes.decoders, codes, strict=True)]
    return x - torch.stack(outputs), codes


def dead_loss(objective, batch, dead):
    """Token by token: the two dead features with the largest pre-activations, against what is missed."""
    saes, x = objective.dictionary, standardise(batch.stream).x
    missed = dense(objective, batch)[0].detach()
    total = 0
    for layer in range(SAES):
        encoder, decoder = saes.encoders[layer], saes.decoders[layer]
        features = [feature for feature in range(FEATURES[layer]) if dead[layer, feature]]
        for token in range(COUNT if features else 0):
            a = {f: (encoder.weight[f] @ x[layer, token] + encoder.bias[f]).relu() for f in features}
            best = sorted(features, key=lambda f: -a[f].item())[: objective.section.dead_features]
            written = sum(a[f] * decoder.weight[f] for f in best)
            total = total + (written - missed[layer, token]).square().mean()
    return total / (SAES * COUNT)


DEAD = torch.zeros(SAES, 10, dtype=torch.bool)
DEAD[1, [0, 3, 4, 8]] = True  # more than the two that may lessen the error


def test_the_loss_by_hand_all_tokens_alike():
    objective, batch = make()
    missed, codes = dense(objective, batch)
    losses = objective(batch)
    torch.testing.assert_close(losses.total, missed.square().mean())
    torch.testing.assert_close(losses.unexplained, missed.square().mean((1, 2)))
    torch.testing.assert_close(losses.variance, objective.variance)
    active = torch.stack([(code.values != 0).double().sum(1).mean() for code in codes])
    torch.testing.assert_close(losses.active, active)
    for layer, code in enumerate(codes):
        fired = set(code.indices[code.values != 0].tolist())
        assert set(losses.fired[layer].nonzero().flatten().tolist()) == fired


@pytest.mark.parametrize("dead_features", [2, 9])
def test_dead_features_are_drawn_to_what_the_others_miss(dead_features):
    objective, batch = make(dead_features=dead_features)
    plain, with_dead = objective(batch), objective(batch, 0.0, DEAD)
    expected = 0.25 * dead_loss(objective, batch, DEAD)
    torch.testing.assert_close(with_dead.total - plain.total, expected)
    names, parameters = zip(*objective.dictionary.named_parameters(), strict=True)
    ours = torch.autograd.grad(with_dead.total - plain.total, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if two is None else two)
    weight = dict(zip(names, ours, strict=True))["encoders.1.weight"]
    assert weight[~DEAD[1]].abs().max() < 1e-12 < weight[DEAD[1]].abs().max()  # it moves dead features alone


def test_gradient_is_that_of_the_dense_loss():
    objective, batch = make()
    parameters = list(objective.dictionary.parameters())
    expected = torch.autograd.grad(dense(objective, batch)[0].square().mean(), parameters)
    for ours, theirs in zip(torch.autograd.grad(objective(batch).total, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_do_what_one_does(world):
    objective, batch = make()
    parameters = list(objective.dictionary.parameters())
    whole = objective(batch, 0.0, DEAD)
    expected = torch.autograd.grad(whole.total, parameters)
    objective.size = StepSize(IMAGES, TOKENS, world)
    share = torch.arange(COUNT) % 7 % world  # uneven
    parts = [Residuals(batch.stream[:, share == rank], batch.is_cls[share == rank]) for rank in range(world)]
    results = [objective(part, 0.0, DEAD) for part in parts]
    gradients = [torch.autograd.grad(losses.total, parameters) for losses in results]
    for ours, theirs in zip(zip(*gradients, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.stack(ours).mean(0), theirs)
    for name in ("unexplained", "variance", "active"):
        torch.testing.assert_close(sum(getattr(losses, name) for losses in results), getattr(whole, name))
    assert torch.equal(torch.stack([losses.fired for losses in results]).any(0), whole.fired)


def test_jumprelu_is_drawn_to_its_targets():
    objective, batch = make("jumprelu", sparsity_weight=3.0)
    objective.dictionary.calibrate(standardise(batch.stream).x)
    _, codes = dense(objective, batch)
    terms = []
    for code, k, k_cls in zip(codes, (3, 2), (2, 4), strict=True):
        active = (code.values > 0).sum(1).double()
        terms += [(active[~batch.is_cls].mean() / k - 1) ** 2, (active[batch.is_cls].mean() / k_cls - 1) ** 2]
    plain, pressed = objective(batch), objective(batch, 0.5)
    torch.testing.assert_close(pressed.total - plain.total, 0.5 * 3.0 * torch.stack(terms).mean())


def test_variance_is_that_of_standardised_tokens_over_all_batches():
    stream = torch.randn(SAES, 40, WIDTH, generator=torch.Generator().manual_seed(1)) * 5 + torch.arange(6.0)
    is_cls = torch.zeros(20, dtype=torch.bool)
    batches = [Residuals(stream[:, :20], is_cls), Residuals(stream[:, 20:], is_cls)]
    x = standardise(stream.double()).x
    expected = (x - x.mean(1, keepdim=True)).square().mean((1, 2)).float()
    torch.testing.assert_close(token_variance(batches), expected)


def test_a_step_renormalises_and_counts_only_features_that_exist():
    objective, batch = make(revive_after=1, warmup_steps=0, learning_rate=0.05)
    objective = objective.float()
    objective.variance = objective.variance.float()
    trainer = Trainer(make_fabric(accelerator="cpu"), objective, objective.settings, 10)
    before = [decoder.weight.clone() for decoder in objective.dictionary.decoders]
    batch = Residuals(batch.stream.float(), batch.is_cls)
    expected = objective(batch)
    metrics = trainer.train_step(batch)
    for decoder, old in zip(objective.dictionary.decoders, before, strict=True):
        torch.testing.assert_close(decoder.weight.norm(dim=-1), torch.ones(len(old)))
        assert not torch.allclose(decoder.weight, old)
    assert metrics.dead == 0
    assert metrics.r2_by_layer == pytest.approx((1 - expected.unexplained / expected.variance).tolist(), abs=1e-5)
    trainer.silent.fill_(100)
    assert trainer.dead.sum(1).tolist() == list(FEATURES)


def test_a_feature_that_reads_nothing_at_any_token_is_brought_back():
    """The loss of dead features does not reach it, as its pre-activations are negative; its bias is raised."""

    def fires(steps, **settings):
        objective, batch = make(revive_after=1, warmup_steps=0, learning_rate=0.05, decay_share=0.01, **settings)
        objective = objective.float()
        objective.variance = objective.variance.float()
        encoder = objective.dictionary.encoders[0]
        with torch.no_grad():
            encoder.bias[2] = -8.0
        batch = Residuals(batch.stream.float(), batch.is_cls)
        trainer = Trainer(make_fabric(accelerator="cpu"), objective, objective.settings, 10_000)
        for _ in range(steps):
            trainer.train_step(batch)
        x = standardise(batch.stream).x
        codes, _ = objective.dictionary(x, batch.is_cls)
        return bool((codes[0].indices[codes[0].values > 0] == 2).any())

    assert not fires(300, revive_rate=0)
    assert fires(300)
