"""What units answer to: constructed units of which it is known, figures by numpy, and over images in batches."""

import numpy as np
import pytest
import torch
from rich.console import Console

from vitrine.models.dictionary.residual_sae import standardise
from vitrine.training.data.held_out import held_out
from vitrine.training.evaluation.code import Code
from vitrine.training.evaluation.levels import levels
from vitrine.training.evaluation.unit_statistics import EXEMPLARS, Batch, UnitStatistics

IMAGES, PATCHES, CLASSES = 200, 9, 4


@pytest.fixture(scope="module")
def made():
    """(activations [B, P, 5], `Batch`): a position detector, one of class 2, a red one, noise, one that is silent."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(CLASSES, (IMAGES,), generator=generator)
    colours = torch.rand(IMAGES, PATCHES, 3, generator=generator)
    places = torch.stack([torch.randperm(PATCHES, generator=generator) for _ in range(IMAGES)])
    z = torch.zeros(IMAGES, PATCHES, 5)
    z[:, 3, 0] = 2.0
    z[:, :, 1] = (classes == 2).float()[:, None] * torch.tensor([1.0, *[0.0] * 8])
    z[:, :, 2] = colours @ torch.tensor([1.0, -0.2, 0.0]) + 0.3
    z[:, :, 3] = torch.rand(IMAGES, PATCHES, generator=generator)
    return z, Batch(classes, colours, classes.roll(1), colours.roll(1, 0), places)


def measured(z, batch, size):
    statistics = UnitStatistics(z.shape[-1], PATCHES, CLASSES, z.device)
    for at in range(0, len(z), size):
        statistics.update(z[at : at + size], Batch(*(part[at : at + size] for part in batch)))
    return statistics


@pytest.mark.parametrize("size", [IMAGES, 7])
def test_units_that_are_known(made, size):
    statistics = measured(*made, size)
    own, chance = statistics.measured(), statistics.measured(shuffled=True)
    assert statistics.counted.tolist() == [True] * 4 + [False]
    assert float(own.position[0]) == pytest.approx(1)
    assert float(own.of_class[1]) == pytest.approx(1, abs=1e-5)
    assert float(own.colour[2]) == pytest.approx(1, abs=1e-4)
    assert float(own.purity[1]) == 1
    for figure in (own.position[3], own.of_class[3], own.colour[3], chance.position, chance.of_class[1:4]):
        assert (figure[~figure.isnan()] < 0.1).all()
    assert (chance.colour[:4] < 0.05).all()
    assert float(chance.purity[1]) < 0.8
    assert own.position.isnan().tolist() == [False] * 4 + [True]
    torch.testing.assert_close(
        statistics.fires[:2], torch.tensor([1 / 9, (made[1].classes == 2).double().mean() / 9]).double()
    )
    assert statistics.spread[:3].tolist() == pytest.approx([1 / 9, 1 / 9, 1])
    assert statistics.evenness[:2].tolist() == pytest.approx([1 / 9, 1 / 9])


def test_figures_by_numpy(made):
    z, batch = made
    own = measured(z, batch, 64).measured()
    x, classes = z[..., 3].double().numpy(), batch.classes.numpy()
    assert float(own.position[3]) == pytest.approx(x.mean(0).var() / x.var(), rel=1e-4)
    means = x.mean(1)
    between = sum((classes == c).mean() * (means[classes == c].mean() - means.mean()) ** 2 for c in range(CLASSES))
    assert float(own.of_class[3]) == pytest.approx(between / means.var(), rel=1e-3)
    design = np.column_stack([np.ones(x.size), batch.colours.reshape(-1, 3).numpy()])
    fitted = design @ np.linalg.lstsq(design, x.ravel(), rcond=None)[0]
    assert float(own.colour[3]) == pytest.approx(fitted.var() / x.var(), rel=1e-2)
    strongest = np.argsort(-z[..., 3].amax(1).numpy())[:EXEMPLARS]
    assert float(own.purity[3]) == np.bincount(classes[strongest]).max() / EXEMPLARS


def test_images_without_classes_have_no_figures_of_them(made):
    z, batch = made
    unknown = torch.full((IMAGES,), -1)
    statistics = UnitStatistics(5, PATCHES, 0, z.device)
    statistics.update(z, batch._replace(classes=unknown, shuffled_classes=unknown))
    own = statistics.measured()
    assert own.of_class.isnan().all()
    assert own.purity.isnan().all()
    assert float(own.position[0]) == pytest.approx(1)


@torch.no_grad()
def test_levels_are_over_all_images(clip, make_saes, recipe, data_root):
    saes = make_saes(clip, k=10)
    many = recipe.data.model_copy(update={"val": recipe.data.train})
    images = held_out(many, data_root, clip, workers=0, batch_size=5)
    found = levels(clip, saes, images, Console(quiet=True))
    assert (found.images, found.classes) == (48, 3)
    assert [layer.units for layer in found.untrained] == list(saes.architecture.features)
    pixels, truth = (torch.cat(parts) for parts in zip(*images.batches(), strict=True))
    stream = clip.tower.embed(pixels)
    stream = stream + clip.tower.attention(0, stream)
    stream = stream + clip.tower.mlp(0, stream)[1]
    for of_layer, activations in (
        (found.neurons[0], standardise(stream).x),
        (found.features[0], Code(saes, 0, stream).values),
    ):
        z = activations[:, 1:].double()
        fires = (z != 0).any(1)
        counted = fires.sum(0) >= EXEMPLARS
        assert 0 < of_layer.counted == int(counted.sum())
        z = z[..., counted]
        position = z.mean(0).var(0, correction=0) / z.flatten(0, 1).var(0, correction=0)
        assert of_layer.position.median == pytest.approx(float(position.quantile(0.5)), rel=1e-3)
        assert of_layer.position.over_half == pytest.approx(float((position > 0.5).double().mean()))
        means = z.mean(1)
        of_classes = torch.stack([means[truth == c].mean(0) for c in range(3)])
        by_class = of_classes.var(0, correction=0) / means.var(0, correction=0)  # sixteen images each
        assert of_layer.of_class.median == pytest.approx(float(by_class.quantile(0.5)), rel=1e-3)
        assert of_layer.fires == pytest.approx(float((z != 0).double().mean((0, 1)).median()))
