"""Images and a tower whose values show where they come from."""

import pytest
import torch
from PIL import Image
from torch import nn

from vitrine.models.clip.tower import Taps
from vitrine.training.data.images import Images


class Numbers:
    """A source whose image number i has the red value i and the class 10 i."""

    title, classes = "numbers", ("none",)

    def __init__(self, count, broken):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def name(self, index):
        return f"number {index}"

    def read(self, index):
        if index in self.broken:
            raise OSError("torn")
        return Image.new("RGB", (2, 2), (index, 0, 0)), 10 * index


@pytest.fixture(scope="session")
def numbers():
    """numbers(count, broken=(), max_broken=0) -> `Images` [3, 2, 2]; the pixels of image number i have the value i."""

    def make(count, broken=(), max_broken=0.0):
        return Images(Numbers(count, broken), _red, max_broken)

    return make


def _red(image):
    return torch.tensor(float(image.getpixel((0, 0))[0])).expand(3, 2, 2)


class MarkingTower(nn.Module):
    """Two layers, five tokens: mlp_in is [image, token], 1,000 more in layer 1; mlp_out its negative."""

    layers, tokens, width = 2, 5, 2

    def __init__(self):
        super().__init__()
        self.device = nn.Parameter(torch.zeros(()))
        self.batches = []  # the images that were forwarded

    def forward(self, pixels):
        image = pixels[:, 0, 0, 0]
        self.batches.append(image.int().tolist())
        image = image[:, None].expand(-1, self.tokens)
        marks = torch.stack([image, torch.arange(5.0).expand_as(image)], -1)
        mlp_in = torch.stack([marks, marks + 1000])
        return Taps(marks, mlp_in, mlp_in, -mlp_in, marks)


@pytest.fixture
def marking_tower():
    return MarkingTower()
