"""The order of images depends on (seed, epoch) alone; images that cannot be read are named."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.data import DataError, batches, image_folder, steps_per_epoch


class Numbers(list):
    """A data set whose image number i is the number i, of class 10 i."""

    root = "numbers"

    def __init__(self, count):
        super().__init__((torch.tensor(i), 10 * i) for i in range(count))


def order(folder, size, **options):
    found = []
    for pixels, classes in batches(folder, size, 0, **options):
        assert classes.tolist() == [10 * number for number in pixels.tolist()]
        found.append(pixels.tolist())
    return found


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(1, 20), st.integers(1, 3), st.integers(0, 5))
def test_order_is_a_function_of_seed_and_epoch(data, count, epochs, seed):
    size = data.draw(st.integers(1, count))
    folder = Numbers(count)
    whole = order(folder, size, seed=seed, epochs=epochs)
    assert order(folder, size, seed=seed, epochs=epochs) == whole
    assert order(folder, size, seed=seed, epochs=epochs + 1)[: len(whole)] == whole  # longer runs begin alike
    skip = data.draw(st.integers(0, len(whole)))
    assert order(folder, size, seed=seed, epochs=epochs, skip=skip) == whole[skip:]


@given(st.data(), st.integers(1, 30))
def test_an_epoch_sees_no_image_twice_and_leaves_out_less_than_a_batch(data, count):
    size = data.draw(st.integers(1, count))
    seen = [number for batch in order(Numbers(count), size, seed=0, epochs=1) for number in batch]
    assert len(seen) == len(set(seen)) == count // size * size


def test_epochs_and_seeds_differ():
    first, second = (order(Numbers(50), 50, seed=0, epochs=2)[epoch] for epoch in (0, 1))
    assert first != second
    (other,) = order(Numbers(50), 50, seed=1, epochs=1)
    assert other not in (first, second)
    assert sorted(first) == list(range(50))


@pytest.mark.parametrize(("count", "size", "steps"), [(10, 3, 3), (9, 3, 3), (2, 3, 0)])
def test_steps_per_epoch_are_full_batches(count, size, steps):
    assert steps_per_epoch(Numbers(count), size) == steps


def test_too_few_images_are_told():
    with pytest.raises(DataError, match="numbers holds 3 images, fewer than one step's 4"):
        order(Numbers(3), 4, seed=0, epochs=1)


def test_images_are_read_in_class_folders(data_root, clip):
    folder = image_folder(data_root / "train", clip.transform())
    assert folder.classes == ["blue triangle", "green square", "red circle"]
    pixels, classes = next(batches(folder, 8, 0, seed=0, epochs=1))
    assert pixels.shape == (8, 3, 32, 32)
    assert set(classes.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode_become_rgb(tmp_path, clip, mode):
    (tmp_path / "class").mkdir()
    Image.new(mode, (40, 40)).save(tmp_path / "class/image.tiff")
    pixels, _ = image_folder(tmp_path, clip.transform())[0]
    assert pixels.shape == (3, 32, 32)


@pytest.mark.parametrize("kind", ["missing", "empty", "without images"])
def test_folder_without_images_is_named(tmp_path, clip, kind):
    root = tmp_path / "images"
    if kind != "missing":
        root.mkdir()
    if kind == "without images":
        (root / "class").mkdir()
        (root / "class/notes.txt").touch()
    with pytest.raises(DataError, match=f"no images under {root}"):
        image_folder(root, clip.transform())


def _png(data_root):
    return (data_root / "train/red circle/00.png").read_bytes()


def _with_chunk_of_half_its_length(png, chunk):
    start = png.index(chunk) - 4
    (length,) = struct.unpack(">I", png[start : start + 4])
    return png[:start] + struct.pack(">I", length // 2) + png[start + 4 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda png: b"",
        lambda png: b"no image",
        lambda png: png[: len(png) // 2],
        lambda png: png[:30],
        lambda png: _with_chunk_of_half_its_length(png, b"IDAT"),
        lambda png: _with_chunk_of_half_its_length(png, b"IHDR"),
    ],
    ids=["empty", "text", "half", "head", "short IDAT", "short IHDR"],
)
def test_broken_image_is_named(tmp_path, data_root, clip, damage):
    broken = tmp_path / "class/broken.png"
    broken.parent.mkdir()
    broken.write_bytes(damage(_png(data_root)))
    folder = image_folder(tmp_path, clip.transform())
    with pytest.raises(DataError, match=f"^{broken} is no readable image"):
        next(batches(folder, 1, 0, seed=0, epochs=1))


def test_broken_image_is_named_by_a_worker_process_too(tmp_path, clip):
    broken = tmp_path / "class/broken.png"
    broken.parent.mkdir()
    broken.touch()
    message = ""
    try:  # not pytest.raises: it would keep the worker process alive
        next(batches(image_folder(tmp_path, clip.transform()), 1, 1, seed=0, epochs=1))
    except DataError as error:
        message = str(error)
    assert message.startswith(f"{broken} is no readable image")
