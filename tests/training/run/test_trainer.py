"""Single optimiser steps."""

import math

import pytest
import torch

from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.training.data.activations import Activations
from vitrine.training.data.normalisation import Normalisation
from vitrine.training.recipes.recipe import CltTrainingSection
from vitrine.training.run.objective import Reconstruction, StepSize
from vitrine.training.run.parallel import make_fabric
from vitrine.training.run.trainer import Trainer, TrainingDiverged


@pytest.fixture
def batch():
    """Two layers, two images of three tokens."""
    generator = torch.Generator().manual_seed(1)
    mlp_in, mlp_out = (torch.randn(2, 6, 4, generator=generator) for _ in range(2))
    return Activations(mlp_in, mlp_out, torch.tensor([True, False, False] * 2))


def make(steps=10, k=3, sparsifier="relu_topk", **settings):
    clt = CrossLayerTranscoder(Architecture(2, 4, 6, (k,) * 2, (k,) * 2, sparsifier))
    clt.initialise(torch.Generator().manual_seed(0))
    zeros, ones = torch.zeros(2, 4), torch.ones(2)
    section = CltTrainingSection(**settings)
    normalisation = Normalisation(zeros, ones, zeros, ones, zeros, ones, 2 * ones)  # some tokens are outliers
    objective = Reconstruction(clt, normalisation, section, StepSize(2, 3))
    return Trainer(make_fabric(accelerator="cpu"), objective, section, steps)


def test_metrics_of_a_step(batch):
    trainer = make(cls_weight=5, learning_rate=0.5, warmup_steps=5)
    expected = trainer.objective(batch)
    metrics = trainer.train_step(batch)
    assert metrics.loss == pytest.approx(expected.total.item())
    r2 = 1 - expected.unexplained / expected.variance
    assert 0 < expected.variance.min() < 1
    assert metrics.r2_by_layer == pytest.approx(r2.tolist())
    assert metrics.r2 == pytest.approx(r2.mean().item(), abs=1e-6)
    assert metrics.l0_by_layer == pytest.approx(expected.active.tolist())
    assert metrics.l0 == pytest.approx(expected.active.mean().item())
    assert metrics.rate == pytest.approx(0.1)
    assert metrics.dead == 0


def test_first_step_of_adam_moves_weights_by_the_warmed_up_rate(batch):
    trainer = make(learning_rate=0.04, warmup_steps=4)
    before = trainer.dictionary.decoder_biases().clone()
    trainer.train_step(batch)
    moved = (trainer.dictionary.decoder_biases() - before).abs()
    torch.testing.assert_close(moved, torch.full((2, 4), 0.01), rtol=1e-3, atol=0)


def test_squared_gradients_are_remembered_as_the_recipe_says(batch):
    trainer = make(beta2=0.5)
    trainer.train_step(batch)
    for name, parameter in trainer.parameters.items():
        torch.testing.assert_close(trainer.state()[f"adam.{name}.exp_avg_sq"], 0.5 * parameter.grad.square())


def test_gradient_is_clipped(batch):
    trainer = make(gradient_clip=0.01)
    trainer.train_step(batch)
    norm = torch.cat([parameter.grad.flatten() for parameter in trainer.dictionary.parameters()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_is_noticed_before_any_weight_is_spoilt(batch, value):
    trainer = make()
    before = {name: tensor.clone() for name, tensor in trainer.dictionary.state_dict().items()}
    with pytest.raises(TrainingDiverged, match="loss is nan at step 0"):
        trainer.train_step(batch._replace(mlp_out=torch.full_like(batch.mlp_out, value)))
    assert trainer.step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.dictionary.state_dict().items())


def test_gradient_that_is_no_number_is_noticed_too(batch):
    """A finite loss may still have an infinite gradient."""
    trainer = make()
    trainer.dictionary.encoders[0].weight.register_hook(lambda gradient: gradient * math.inf)
    before = {name: tensor.clone() for name, tensor in trainer.dictionary.state_dict().items()}
    with pytest.raises(TrainingDiverged, match=r"gradient is .* at step 0"):
        trainer.train_step(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.dictionary.state_dict().items())


def test_silent_features_are_counted_in_tokens(batch):
    trainer = make(revive_after=12, revive_rate=0)
    with torch.no_grad():
        trainer.dictionary.encoders[1].bias[4] = -100.0
    dead = [trainer.train_step(batch).dead for _ in range(4)]
    assert dead == [0, 0, 1, 1]  # counted before a step: silent for 6, 12, 18 tokens after it
    assert trainer.silent[1, 4] == 24
    assert trainer.dead.nonzero().tolist() == [[1, 4]]


def test_dead_feature_comes_back(batch):
    def fires_after(steps, revive_rate):
        schedule = {"learning_rate": 0.05, "warmup_steps": 0, "decay_share": 0.01, "revive_share": 1}
        trainer = make(steps=steps, revive_after=12, revive_rate=revive_rate, **schedule)
        with torch.no_grad():
            trainer.dictionary.encoders[1].bias[4] = -4.0
        silent = []
        for _ in range(steps):
            trainer.train_step(batch)
            silent.append(int(trainer.silent[1, 4]))
        assert silent[:2] == [6, 12]
        return 0 in silent  # whether it goes on depends on the others, and on rounding

    assert not fires_after(200, revive_rate=0)
    assert not fires_after(20, revive_rate=1)
    assert fires_after(200, revive_rate=1)
    assert fires_after(20, revive_rate=10)


def test_revival_raises_dead_biases_alone_by_the_rate_and_leaves_adam_alone(batch):
    def after_two_steps(revive_rate):
        trainer = make(revive_after=6, revive_rate=revive_rate, learning_rate=0.05, warmup_steps=0, decay_share=0.01)
        with torch.no_grad():
            trainer.dictionary.encoders[1].bias[4] = -4.0
        trainer.train_step(batch)
        dead = trainer.dead.clone()
        trainer.train_step(batch)
        return dead, trainer.dictionary.state_dict(), trainer.state()

    dead, plain, adam = after_two_steps(0)
    _, revived, adam_revived = after_two_steps(3)
    assert dead[1, 4]
    for name, tensor in revived.items():
        layer = int(name.split(".")[1])
        lift = 0.15 * dead[layer] if name == f"encoders.{layer}.bias" else torch.zeros_like(tensor)
        torch.testing.assert_close(tensor, plain[name] + lift, rtol=0, atol=1e-6)
    assert adam.keys() == adam_revived.keys()
    assert all(torch.equal(tensor, adam_revived[name]) for name, tensor in adam.items())


def test_revival_ends_with_its_share_of_the_run(batch):
    trainer = make(steps=10, revive_after=6, revive_share=0.5, learning_rate=1e-3, warmup_steps=0)
    bias = trainer.dictionary.encoders[1].bias
    with torch.no_grad():
        bias[4] = -4.0
    rises = []
    for _ in range(8):
        before = bias[4].item()
        trainer.train_step(batch)
        rises.append(bias[4].item() > before)
    assert rises == [False, True, True, True, True, False, False, False]  # dead after the first step


def test_code_narrows_to_its_budget(batch):
    trainer = make(steps=10, k=2, k_start=3.0, k_anneal_share=0.5)
    places = []
    for _ in range(7):
        trainer.train_step(batch)
        places.append(trainer.dictionary.encoders[0].sparsifier.places)
    assert places == [6, 5, 4, 4, 3, 2, 2]  # 2 times 3, 2.6, 2.2, 1.8, 1.4, 1, 1


def test_state_is_all_that_the_next_step_needs(batch):
    one = make(revive_after=6, learning_rate=0.1)
    for _ in range(3):
        one.train_step(batch)
    two = make(revive_after=6, learning_rate=0.1)
    two.dictionary.load_state_dict(one.dictionary.state_dict())
    two.restore({key: tensor.clone() for key, tensor in one.state().items()}, step=3)
    assert one.train_step(batch) == two.train_step(batch)
    for name, tensor in one.dictionary.state_dict().items():
        assert torch.equal(two.dictionary.state_dict()[name], tensor)
