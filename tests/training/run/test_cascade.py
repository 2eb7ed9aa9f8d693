"""The cascade's losses, against a loop that replaces MLP after MLP."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from vitrine.training.data.activations import Activations
from vitrine.training.data.normalisation import Normalisation
from vitrine.training.recipes.recipe import CascadeSection, CltTrainingSection
from vitrine.training.run.cascade import Cascade, Denormalised
from vitrine.training.run.objective import Reconstruction, StepSize

IMAGES = 4


@pytest.fixture
def pixels(make_pixels):
    return make_pixels(IMAGES)


@pytest.fixture
def normalisation(clip, make_pixels):
    estimate = Normalisation.estimate([Activations.of(clip.tower(make_pixels(8, seed=5)))])
    return replace(estimate, outlier_norm=estimate.outlier_norm / 3)  # so that half of the tokens are outliers


@pytest.fixture
def make(clip, make_clt, normalisation):
    """make(**cascade settings) -> the objective, on a fresh CLT."""

    def make(**weights):
        clt = make_clt(clip, k=6, k_cls=4).requires_grad_(True)
        size = StepSize(IMAGES, clip.tower.tokens)
        reconstruction = Reconstruction(clt, normalisation, CltTrainingSection(cls_weight=5), size)
        labels = normalize(torch.randn(7, clip.tower.embedding, generator=torch.Generator().manual_seed(1)), dim=-1)
        return Cascade(clip.tower, reconstruction, CascadeSection(steps=1, **weights), labels, logit_scale=20.0)

    return make


def replaced_by_hand(clip, clt, normalisation, pixels):
    """(final residual, the CLT's outputs [L, N, d]): every MLP replaced, token by token through dense products."""
    tower, norm = clip.tower, normalisation
    folded = norm.fold_into(clt)
    stream, codes, outputs = tower.embed(pixels), [], []
    is_cls = (torch.arange(tower.tokens) == 0).repeat(len(pixels))
    for layer in range(tower.layers):
        stream = stream + tower.attention(layer, stream)
        x = tower.blocks[layer].ln_2(stream).flatten(0, 1)
        codes.append(folded.encoders[layer].encode_dense(x, is_cls))
        outputs.append(folded.decoders[layer].decode_dense(codes))
        stream = stream + outputs[-1].unflatten(0, (len(pixels), -1))
    return stream, torch.stack(outputs)


def test_each_loss_by_hand(make, clip, normalisation, pixels):
    objective = make(clean_weight=0.5, replaced_weight=2.0, prediction_weight=3.0)
    clt = objective.reconstruction.dictionary
    taps = clip.tower(pixels)
    stream, outputs = replaced_by_hand(clip, clt, normalisation, pixels)

    error = (outputs - taps.mlp_out.flatten(1, 2)) / normalisation.out_scale[:, None, None]
    length = taps.mlp_out.flatten(1, 2).norm(dim=-1)
    longest = normalisation.outlier_norm[:, None]
    weight = torch.where(length > longest, (longest / length) ** 2, 1.0)
    weight[:, :: clip.tower.tokens] = 5 * (normalisation.out_scale / normalisation.out_scale_cls).square()[:, None]
    replaced = (error.square().mean(-1) * weight).sum(1).mean() / (IMAGES * (clip.tower.tokens - 1 + 5))
    p, q = (
        (20 * normalize(clip.tower.head(residual[:, 0]), dim=-1) @ objective.label_embeddings.T).softmax(-1)
        for residual in (taps.residual_out, stream)
    )
    divergence = (p * (p / q).log()).sum(-1).mean()
    clean = objective.reconstruction(Activations.of(taps)).total
    losses = objective(pixels)
    torch.testing.assert_close(losses.total, 0.5 * clean + 2 * replaced + 3 * divergence, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        losses.unexplained, (error.square().mean(-1) * (length <= longest)).mean(1), rtol=1e-4, atol=1e-6
    )
    assert divergence > 0.01
    assert abs(replaced - clean) > 1e-4


def test_gradient_reaches_the_first_layer_through_the_tower(make, pixels):
    objective = make(clean_weight=0, replaced_weight=0, prediction_weight=1)
    clt = objective.reconstruction.dictionary
    weight = clt.encoders[0].weight
    (gradient,) = torch.autograd.grad(objective(pixels).total, weight)
    direction, size = gradient / gradient.norm(), 1e-3
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight += sign * size * direction
            values.append(objective(pixels).total.double())
            weight -= sign * size * direction
    slope = (values[0] - values[1]) / (2 * size)
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_only_the_clt_is_trained(make, clip):
    objective = make()
    trained = {id(parameter) for parameter in objective.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in objective.reconstruction.dictionary.parameters()}


def test_perfect_stand_in_has_nothing_to_learn(make, clip, pixels, monkeypatch):
    """With MLPs instead of the CLT, both losses under replacement vanish."""
    objective = make(clean_weight=0)
    denormalised = objective.replacement.clt
    monkeypatch.setattr(denormalised, "decoders", [_Perfect(clip.tower, layer) for layer in range(clip.tower.layers)])
    monkeypatch.setattr(denormalised, "encoders", [lambda x, is_cls: x] * clip.tower.layers)
    assert objective(pixels).total.item() == pytest.approx(0, abs=1e-6)


class _Perfect:
    def __init__(self, tower, layer):
        self.tower, self.layer = tower, layer

    def __call__(self, codes):
        return self.tower.mlp_output(self.layer, codes[self.layer])


def test_denormalised_is_the_folded_clt(make, normalisation, clip, pixels):
    clt = make().reconstruction.dictionary
    batch = Activations.of(clip.tower(pixels))
    raw, folded = Denormalised(clt, normalisation), normalisation.fold_into(clt)
    codes = [encoder(x, batch.is_cls) for encoder, x in zip(raw.encoders, batch.mlp_in, strict=True)]
    expected, outputs = folded(batch.mlp_in, batch.is_cls)
    for ours, theirs in zip(codes, expected, strict=True):
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack([decoder(codes) for decoder in raw.decoders]), outputs, rtol=1e-4, atol=1e-4)
