"""The cosine that nearly all of the images of an export reach with their best label."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from vitrine.models.bundle.manifest import FIT_IMAGES
from vitrine.models.export.label_fit import label_fit
from vitrine.models.progress import Progress


class Angles(torch.nn.Module):
    """Embeds an image in the plane, at the angle that its first pixel has."""

    def encode_image(self, pixels, normalize):
        assert normalize
        return torch.stack([pixels[:, 0, 0, 0].cos(), pixels[:, 0, 0, 0].sin()], dim=1)


@pytest.fixture
def measured():
    def measure(angles, sizes):
        pixels = torch.tensor(angles, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)
        clip = SimpleNamespace(model=Angles())
        labels = np.array([[1, 0], [0, 1]], np.float32)  # at 0 and at a right angle
        return label_fit(clip, pixels.split(sizes), labels, Progress(Console(quiet=True)))

    return measure


def test_a_hundredth_of_the_images_is_below(measured):
    angles = np.linspace(0, np.pi / 4, 201)  # from a label to halfway between the two
    fit = measured(angles, [100, 1, 100])
    assert fit.images == 201
    assert fit.low_cosine == pytest.approx(np.cos(angles[198]), abs=1e-6)  # two of 201 are further off
    assert measured(np.pi / 2 - angles, [201]).low_cosine == pytest.approx(fit.low_cosine, abs=1e-6)


def test_few_images_say_nothing(measured):
    assert measured(np.zeros(FIT_IMAGES - 1), [FIT_IMAGES - 1]) is None
    assert measured(np.zeros(FIT_IMAGES), [FIT_IMAGES]).low_cosine == pytest.approx(1)
