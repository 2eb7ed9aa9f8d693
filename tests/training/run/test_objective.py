"""The losses, against float64 loops over tokens and layers."""

import itertools

import pytest
import torch

from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.training.data.activations import Activations
from vitrine.training.data.normalisation import Normalisation
from vitrine.training.recipes.recipe import CltTrainingSection
from vitrine.training.run.objective import Reconstruction, StepSize

LAYERS, WIDTH, FEATURES, TOKENS, IMAGES = 3, 6, 10, 4, 5
COUNT = IMAGES * TOKENS


def make(sparsifier="relu_topk", seed=0, **settings):
    """(objective on a random CLT and normalisation, batch of 5 images of 4 tokens), all float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    clt = CrossLayerTranscoder(Architecture(LAYERS, WIDTH, FEATURES, (3, 2, 4), (2, 2, 3), sparsifier))
    clt.initialise(generator)
    for parameter in clt.parameters():
        parameter.data.add_(0.1 * random(*parameter.shape))
    normalisation = Normalisation(
        random(LAYERS, WIDTH),
        random(LAYERS).exp(),
        random(LAYERS, WIDTH),
        random(LAYERS).exp(),
        random(LAYERS, WIDTH),
        random(LAYERS).exp(),
        torch.tensor([2.0, 2.5, 3.0]),  # outliers are a half, a fourth, a tenth of the tokens
    )
    for field, tensor in vars(normalisation).items():
        setattr(normalisation, field, tensor.double())
    batch = Activations(
        random(LAYERS, COUNT, WIDTH).double(), random(LAYERS, COUNT, WIDTH).double(), torch.arange(COUNT) % TOKENS == 0
    )
    objective = Reconstruction(clt.double(), normalisation, CltTrainingSection(**settings), StepSize(IMAGES, TOKENS))
    return objective, batch


def normalised(objective, batch):
    norm = objective.normalisation
    x = torch.stack([(batch.mlp_in[i] - norm.in_mean[i]) / norm.in_scale[i] for i in range(LAYERS)])
    y = torch.stack([(batch.mlp_out[i] - norm.out_mean[i]) / norm.out_scale[i] for i in range(LAYERS)])
    return x, y


def squared_errors(objective, batch):
    """[L, N], by dense products."""
    x, y = normalised(objective, batch)
    codes = [
        encoder.encode_dense(x[layer], batch.is_cls) for layer, encoder in enumerate(objective.dictionary.encoders)
    ]
    decoded = torch.stack([decoder.decode_dense(codes) for decoder in objective.dictionary.decoders])
    return (decoded - y).square().mean(-1), codes


def weights_by_hand(objective, batch, cls_weight=7.0):
    """[L, N], and the sum of weights by which the loss is divided in every layer."""
    norm, weights = objective.normalisation, torch.ones(LAYERS, COUNT, dtype=torch.float64)
    for layer, token in itertools.product(range(LAYERS), range(COUNT)):
        length = batch.mlp_out[layer, token].norm()
        if token % TOKENS == 0:
            weights[layer, token] = cls_weight * norm.out_scale[layer] ** 2 / norm.out_scale_cls[layer] ** 2
        elif length > norm.outlier_norm[layer]:
            weights[layer, token] = (norm.outlier_norm[layer] / length) ** 2
    return weights, IMAGES * (TOKENS - 1 + cls_weight)


def test_cls_weighs_by_its_own_variance_and_outliers_by_their_length():
    objective, batch = make(cls_weight=7)
    errors, codes = squared_errors(objective, batch)
    weights, total = weights_by_hand(objective, batch)
    assert 5 < (weights[:, ~batch.is_cls] < 1).sum() < 30
    losses = objective(batch, pressure=1.0)
    torch.testing.assert_close(losses.total, (errors * weights).sum() / (LAYERS * total))
    kept = batch.mlp_out.norm(dim=-1) <= objective.normalisation.outlier_norm[:, None]
    torch.testing.assert_close(losses.variance, kept.double().mean(1), check_dtype=False)
    torch.testing.assert_close(
        losses.unexplained / losses.variance, torch.stack([e[k].mean() for e, k in zip(errors, kept, strict=True)])
    )
    at_cls = batch.is_cls
    of_cls = (objective.normalisation.out_scale_cls / objective.normalisation.out_scale) ** 2
    torch.testing.assert_close(
        losses.unexplained_cls / losses.variance_cls, errors[:, at_cls].mean(1) / of_cls, check_dtype=False
    )
    l0 = [(code.values != 0).sum(1).double().mean() for code in codes]
    torch.testing.assert_close(losses.active, torch.stack(l0))


def test_by_default_cls_weighs_as_the_root_of_the_patches():
    objective, batch = make()
    errors, _ = squared_errors(objective, batch)
    weights, total = weights_by_hand(objective, batch, cls_weight=3**0.5)
    torch.testing.assert_close(objective(batch).total, (errors * weights).sum() / (LAYERS * total))


def test_gradient_is_that_of_the_dense_loss():
    objective, batch = make(cls_weight=7)
    names, parameters = zip(*objective.dictionary.named_parameters(), strict=True)
    errors, _ = squared_errors(objective, batch)
    weights, total = weights_by_hand(objective, batch)
    expected = torch.autograd.grad((errors * weights).sum(1).mean() / total, parameters)
    gradients = torch.autograd.grad(objective(batch).total, parameters)
    for name, ours, theirs in zip(names, gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_do_what_one_does(world):
    """Each has some of the tokens; gradients are averaged, measures summed."""
    objective, batch = make(cls_weight=7)
    parameters = list(objective.dictionary.parameters())
    whole = objective(batch)
    expected = torch.autograd.grad(whole.total, parameters)
    objective.size = StepSize(IMAGES, TOKENS, world)
    share = torch.arange(COUNT) % 7 % world  # uneven
    parts = [
        Activations(*(part[..., share == rank, :] if part.ndim == 3 else part[share == rank] for part in batch))
        for rank in range(world)
    ]
    results = [objective(part) for part in parts]
    gradients = [torch.autograd.grad(losses.total, parameters) for losses in results]
    for ours, theirs in zip(zip(*gradients, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.stack(ours).mean(0), theirs)
    torch.testing.assert_close(torch.stack([losses.unexplained for losses in results]).sum(0), whole.unexplained)
    torch.testing.assert_close(torch.stack([losses.variance for losses in results]).sum(0), whole.variance)
    torch.testing.assert_close(torch.stack([losses.active for losses in results]).sum(0), whole.active)
    assert torch.equal(torch.stack([losses.fired for losses in results]).any(0), whole.fired)


def test_fired_are_the_features_with_an_activation():
    objective, batch = make()
    _, codes = squared_errors(objective, batch)
    fired = torch.zeros(LAYERS, FEATURES, dtype=torch.bool)
    for layer, code in enumerate(codes):
        for token in range(COUNT):
            for feature, value in zip(code.indices[token], code.values[token], strict=True):
                fired[layer, feature] |= bool(value != 0)
    assert torch.equal(objective(batch).fired, fired)


def test_jumprelu_is_drawn_to_its_targets_per_layer_and_token_type():
    objective, batch = make("jumprelu", sparsity_weight=3.0)
    objective.dictionary.calibrate(normalised(objective, batch)[0])
    _, codes = squared_errors(objective, batch)
    terms = []
    for layer, (k, k_cls) in enumerate(zip((3, 2, 4), (2, 2, 3), strict=True)):
        active = (codes[layer].values > 0).sum(1).double()
        terms += [(active[~batch.is_cls].mean() / k - 1) ** 2, (active[batch.is_cls].mean() / k_cls - 1) ** 2]
    plain, pressed = objective(batch, pressure=0.0), objective(batch, pressure=0.5)
    torch.testing.assert_close(pressed.total - plain.total, 0.5 * 3.0 * torch.stack(terms).mean())
    assert torch.stack(terms).mean() > 0.001
