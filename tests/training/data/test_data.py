"""Broken images are replaced and named; the order of images and tokens is a function of the plan's numbers."""

import re
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from vitrine.training.data.images import DataError, Plan, load
from vitrine.training.data.sources import open_images
from vitrine.training.recipes.image_sources import FolderSource

FOLDER = FolderSource(kind="folder", path=".")


def values(images, batches, workers=0):
    """The numbers that were loaded; asserts that the classes match."""
    loaded = []
    for pixels, classes in load(images, batches, workers):
        assert pixels.shape == (len(classes), 3, 2, 2)
        assert classes.tolist() == [10 * number for number in pixels[:, 0, 0, 0].int().tolist()]
        loaded.append(pixels[:, 0, 0, 0].int().tolist())
    return loaded


def test_images_by_number(numbers):
    images = numbers(5)
    pixels, class_index = images[3]
    assert (len(images), pixels[0, 0, 0], class_index, images.name(3)) == (5, 3, 30, "number 3")
    assert values(images, [[4, 0], [2, 2]]) == [[4, 0], [2, 2]]


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_give_way_to_the_next_readable_one_and_are_named(numbers, workers):
    images = numbers(10, broken={3, 4, 9}, max_broken=0.3)
    assert values(images, [[0, 3, 5], [9, 4, 1]], workers) == [[0, 5, 5], [0, 5, 1]]
    assert images.broken == dict.fromkeys(["number 3", "number 4", "number 9"], "OSError: torn")


def test_a_broken_image_counts_once(numbers):
    images = numbers(10, broken={3}, max_broken=0.1)
    assert values(images, [[3], [3], [3]]) == [[4], [4], [4]]
    assert images[3][1] == 40


@pytest.mark.parametrize(
    ("max_broken", "count", "allowed"), [(0, 10, 0), (0.01, 10, 1), (0.25, 10, 2), (1, 10, 9), (0.5, 1, 0)]
)
def test_how_many_images_may_be_broken(numbers, max_broken, count, allowed):
    assert numbers(count, max_broken=max_broken).allowed_broken == allowed


@pytest.mark.parametrize(
    ("broken", "max_broken", "message"),
    [
        (
            {2},
            0,
            "1 of 10 images cannot be read, but at most 0 are allowed (max_broken = 0): number 2: OSError: torn. Fix",
        ),
        (
            {2, 3},
            0.1,
            "2 of 10 images cannot be read, but at most 1 are allowed (max_broken = 0.1): number 2: OSError: torn; "
            "number 3",
        ),
        (
            range(10),
            0.5,
            "6 of 10 images cannot be read, but at most 5 are allowed (max_broken = 0.5): number 0: OSError: torn; "
            "number 1",
        ),
        (
            range(10),
            1,
            "10 of 10 images cannot be read, but at most 9 are allowed (max_broken = 1): number 0: OSError: torn; "
            "number 1",
        ),
    ],
)
def test_more_broken_images_than_may_be_end_the_run(numbers, broken, max_broken, message):
    with pytest.raises(DataError, match=f"^numbers: {re.escape(message)}"):
        values(numbers(10, broken, max_broken), [[index] for index in range(10)])


def test_broken_images_of_a_checkpoint_are_counted_too(numbers):
    images = numbers(10, broken={3}, max_broken=0.2)
    images.record_broken({"number 8": "torn", "number 9": "torn"})
    with pytest.raises(DataError, match="3 of 10 images"):
        values(images, [[3]])


def test_too_many_broken_images_are_reported_by_a_worker_process_too(numbers):
    message = ""
    try:  # not pytest.raises: it would keep the worker process alive
        values(numbers(10, broken={0, 1}, max_broken=0.1), [[0]], workers=1)
    except DataError as error:
        message = str(error)
    assert message.startswith(
        "numbers: 2 of 10 images cannot be read, but at most 1 are allowed (max_broken = 0.1): number 0: OSError"
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode_become_rgb(tmp_path, clip, mode):
    (tmp_path / "class").mkdir()
    Image.new(mode, (40, 40)).save(tmp_path / "class/image.tiff")
    pixels, _ = open_images(FOLDER, tmp_path, clip.transform())[0]
    assert pixels.shape == (3, 32, 32)


def test_images_are_turned_as_the_service_turns_them(tmp_path):
    (tmp_path / "class").mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "class/image.jpg", exif=exif)
    size, _ = open_images(FOLDER, tmp_path, lambda image: torch.tensor(image.size))[0]
    assert size.tolist() == [20, 40]


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
def test_damaged_file_is_named(tmp_path, data_root, clip, damage):
    broken = tmp_path / "class/broken.png"
    broken.parent.mkdir()
    broken.write_bytes(damage(_png(data_root)))
    (tmp_path / "class/good.png").write_bytes(_png(data_root))
    images = open_images(FOLDER, tmp_path, clip.transform(), max_broken=0.5)
    assert torch.equal(images[0][0], images[1][0])
    assert images.broken.keys() == {str(broken)}
    assert "0x" not in images.broken[str(broken)]  # no addresses: runs can be compared


@st.composite
def plans(draw):
    size = draw(st.integers(1, 6))
    return Plan(
        images=draw(st.integers(size, 40)),
        images_per_step=size,
        mixed_images=size * draw(st.integers(1, 4)),
        seed=draw(st.integers(-2, 5)),
        epochs=draw(st.integers(1, 3)),
    )


def tokens(plan, tokens_per_image, skip=0, rank=0, world=1):
    """For each step the tokens as (image, number of token)."""
    by_step = []
    for visit in plan.visits(skip):
        images = [image for batch in plan.share(visit.chunk, rank, world) for image in batch]
        for places in plan.tokens(visit, tokens_per_image, rank, world):
            by_step.append([(images[place // tokens_per_image], place % tokens_per_image) for place in places.tolist()])
    return by_step


@settings(deadline=None, max_examples=60)
@given(plans(), st.integers(1, 4))
def test_an_epoch_serves_full_steps_and_no_token_twice(plan, tokens_per_image):
    served = tokens(plan, tokens_per_image)
    assert len(served) == plan.steps == plan.epochs * (plan.images // plan.images_per_step)
    assert {len(step) for step in served} == {plan.images_per_step * tokens_per_image}
    for epoch in range(plan.epochs):
        steps = served[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        seen = [token for step in steps for token in step]
        assert len(set(seen)) == len(seen)
        images = {image for image, _ in seen}
        assert len(images) * tokens_per_image == len(seen)  # every token of every image
        assert images <= set(range(plan.images))
        assert plan.images - len(images) < plan.images_per_step


@settings(deadline=None, max_examples=60)
@given(plans(), st.data())
def test_any_step_is_found_without_its_past(plan, data):
    skip = data.draw(st.integers(0, plan.steps))
    assert tokens(plan, 3, skip) == tokens(plan, 3)[skip:]
    longer = Plan(plan.images, plan.images_per_step, plan.mixed_images, plan.seed, plan.epochs + 1)
    assert tokens(longer, 3)[: plan.steps] == tokens(plan, 3)


@settings(deadline=None, max_examples=60)
@given(plans(), st.data())
def test_all_processes_together_serve_the_steps_of_one(plan, data):
    world = data.draw(st.integers(1, plan.images_per_step))
    skip = data.draw(st.integers(0, plan.steps))
    shares = [tokens(plan, 3, skip, rank, world) for rank in range(world)]
    for whole, *parts in zip(tokens(plan, 3, skip), *shares, strict=True):
        assert sorted(token for part in parts for token in part) == sorted(whole)
        for part in parts:  # in the order of the single process
            assert part == [token for token in whole if token in set(part)]


@given(plans(), st.data())
def test_forward_batches_are_no_larger_than_a_step(plan, data):
    world = data.draw(st.integers(1, plan.images_per_step))
    for chunk in range(plan.chunks):
        shares = [plan.share(chunk, rank, world) for rank in range(world)]
        assert max(len(batch) for share in shares for batch in share) <= -(-plan.images_per_step // world)
        assert sorted(image for share in shares for batch in share for image in batch) == sorted(plan.chunk(chunk))


def test_tokens_are_shuffled_over_a_chunk_and_anew_in_every_epoch():
    plan = Plan(images=64, images_per_step=4, mixed_images=32, seed=0, epochs=2)
    served = tokens(plan, 5)
    assert min(len({image for image, _ in step}) for step in served) > 4  # not whole images
    steps = [sorted(step) for step in served]
    assert len(set(map(tuple, steps))) == len(steps)  # no step comes again


def test_every_visit_shuffles_in_its_own_way():
    """Only the places matter, not the images at them."""
    shuffles = {
        (seed, visit.epoch, visit.chunk): tuple(torch.cat(list(plan.tokens(visit, 5))).tolist())
        for seed in (0, 1)
        for plan in [Plan(images=24, images_per_step=4, mixed_images=8, seed=seed, epochs=2)]
        for visit in plan.visits()
    }
    assert len(set(shuffles.values())) == len(shuffles) == 2 * 2 * 3


def test_unmixed_steps_are_whole_images_in_order():
    plan = Plan(images=11, images_per_step=3, mixed_images=3, seed=0, epochs=2)
    for step, images in zip(tokens(plan, 2), plan.batches(), strict=True):
        assert step == [(image, token) for image in images for token in range(2)]
    assert list(plan.batches(skip=4)) == list(plan.batches())[4:]
    first, second = list(plan.batches())[:3], list(plan.batches())[3:]
    assert sorted(first) == sorted(second)  # the same chunks
    orders = [list(Plan(12, 1, 1, 0, epochs=2).batches())[start : start + 12] for start in (0, 12)]
    assert orders[0] != orders[1]


def test_images_lie_in_another_order_for_another_seed():
    one, two = (Plan(50, 50, 50, seed, 1).chunk(0) for seed in (0, 1))
    assert one != two
    assert sorted(one) == sorted(two) == list(range(50))


def test_shapes_of_a_plan():
    plan = Plan(images=107, images_per_step=10, mixed_images=40, seed=0, epochs=3)
    assert (plan.steps_per_epoch, plan.steps, plan.chunks) == (10, 30, 3)
    assert [len(plan.chunk(chunk)) for chunk in range(3)] == [40, 40, 20]
    assert Plan(107, 10, 10, 0, 1).chunks == 10
    assert Plan(107, 10, 400, 0, 1).chunks == 1


def test_plans_that_cannot_be_are_refused():
    with pytest.raises(DataError, match="the data have 3 images, fewer than one step's 4"):
        Plan(3, 4, 4, 0, 1)
    with pytest.raises(ValueError, match="not a multiple"):
        Plan(30, 4, 6, 0, 1)
    with pytest.raises(DataError, match="images_per_step = 4 cannot be divided among 5 processes"):
        Plan(30, 4, 8, 0, 1).share(0, 0, 5)
