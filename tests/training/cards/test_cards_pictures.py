"""Pictures of what the model saw."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vitrine.models.bundle.manifest import Preprocessing
from vitrine.training.cards.pictures import Album

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def preprocessing(height, width):
    return Preprocessing(size=(height, width), mean=MEAN, std=STD, interpolation="bicubic", resize_mode="squash")


def normalised(images):
    """uint8 [N, H, W, 3] as the input of a model."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def opened(picture):
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)


@pytest.fixture
def images():
    """Two: red above blue, and green."""
    pixels = np.zeros((2, 32, 48, 3), np.uint8)
    pixels[0, :16, :, 0] = pixels[0, 16:, :, 2] = pixels[1, :, :, 1] = 200
    return pixels


def test_a_picture_is_what_the_model_saw_upright_and_in_its_colours(images, tmp_path):
    album = Album(tmp_path / "p.npy", preprocessing(32, 48), 2, "thumbnails")
    album.add(0, normalised(images))
    first = opened(album.picture(0))
    assert first.shape == (32, 48, 3)
    assert np.abs(first[4, 24] - [200, 0, 0]).max() < 30
    assert np.abs(first[28, 24] - [0, 0, 200]).max() < 30


def test_large_images_are_made_small(tmp_path):
    album = Album(tmp_path / "p.npy", preprocessing(224, 112), 1, "thumbnails")
    album.add(0, normalised(np.full((1, 224, 112, 3), 90, np.uint8)))
    assert opened(album.picture(0)).shape == (64, 32, 3)
    assert np.abs(opened(album.picture(0)) - 90).max() < 8


def test_the_mean_of_two(images, tmp_path):
    album = Album(tmp_path / "p.npy", preprocessing(32, 48), 2, "means")
    album.add(0, normalised(images))
    mean = opened(album.mean(np.array([0, 1])))
    assert mean.shape == (21, 32, 3)
    assert np.abs(mean[2, 16] - [100, 100, 0]).max() < 30


def test_it_resumes_after_an_interruption(images, tmp_path):
    file = tmp_path / "p.npy"
    Album(file, preprocessing(32, 48), 3, "thumbnails").add(0, normalised(images)[:1])
    album = Album(file, preprocessing(32, 48), 3, "thumbnails")
    album.add(1, normalised(images)[1:])
    assert np.abs(opened(album.picture(0))[4, 24] - [200, 0, 0]).max() < 30
    assert np.abs(opened(album.picture(1))[4, 24] - [0, 200, 0]).max() < 30
    # of another size: recreated
    assert not Album(file, preprocessing(32, 48), 2, "means")._pixels.any()


def test_held_out_images_are_not_kept(images, tmp_path):
    album = Album(tmp_path / "p.npy", preprocessing(32, 48), 1, "thumbnails")
    album.add(0, normalised(images))
    album.add(2, normalised(images))
    assert album._pixels.shape[0] == 1
    assert np.abs(opened(album.picture(0))[4, 24] - [200, 0, 0]).max() < 30
