"""The order of tokens, steps that do not depend on earlier ones."""

import pytest
import torch

from vitrine.training.data.activations import Activations
from vitrine.training.data.images import Plan
from vitrine.training.data.sources import open_images
from vitrine.training.data.stream import steps
from vitrine.training.recipes.recipe import FolderSource

TRAIN = FolderSource(kind="folder", path="train")  # 48 images


def test_tokens_lie_image_by_image_with_cls_first(clip, make_pixels):
    pixels = make_pixels(3)
    taps, flat = clip.tower(pixels), Activations.of(clip.tower(pixels))
    assert flat.is_cls.nonzero().flatten().tolist() == [0, 17, 34]
    for image, token in ((0, 0), (1, 0), (1, 5), (2, 16)):
        place = image * 17 + token
        torch.testing.assert_close(flat.mlp_in[:, place], taps.mlp_in[:, image, token], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(flat.mlp_out[:, place], taps.mlp_out[:, image, token], rtol=1e-5, atol=1e-5)


def marks(step):
    """The (image, token) of a marking tower's step, checked to be the same in both layers and on both sides."""
    assert step.mlp_in.dtype == step.mlp_out.dtype == torch.float32
    torch.testing.assert_close(step.mlp_in[1], step.mlp_in[0] + 1000)
    torch.testing.assert_close(step.mlp_out, -step.mlp_in)
    assert torch.equal(step.is_cls, step.mlp_in[0, :, 1] == 0)
    return [tuple(mark) for mark in step.mlp_in[0].int().tolist()]


def test_steps_serve_the_plans_tokens(numbers, marking_tower):
    plan = Plan(images=23, images_per_step=3, mixed_images=6, seed=0, epochs=2)
    served = [marks(step) for step in steps(Activations, marking_tower, numbers(23), plan, workers=0)]
    expected = []
    for visit in plan.visits():
        images = plan.chunk(visit.chunk)
        for places in plan.tokens(visit, 5):
            expected.append([(images[place // 5], place % 5) for place in places.tolist()])
    assert served == expected
    for epoch in (served[:7], served[7:]):
        assert len({mark for step in epoch for mark in step}) == 7 * 3 * 5
    assert {len(batch) for batch in marking_tower.batches} == {3}


def test_unmixed_steps_are_whole_images(numbers, marking_tower):
    plan = Plan(images=11, images_per_step=3, mixed_images=3, seed=0, epochs=2)
    for step, images in zip(
        steps(Activations, marking_tower, numbers(11), plan, workers=0), plan.batches(), strict=True
    ):
        assert marks(step) == [(image, token) for image in images for token in range(5)]


@pytest.mark.parametrize("mixed_images", [8, 32])
@pytest.mark.parametrize("skip", [1, 3, 4, 5, 6, 9, 11, 12])  # chunks end at 4 or 2, 6, 10 or 8, 12
def test_a_resumed_run_sees_the_same_bits(clip, data_root, mixed_images, skip):
    plan = Plan(images=48, images_per_step=8, mixed_images=mixed_images, seed=0, epochs=2)
    images = open_images(TRAIN, data_root, clip.transform())
    whole = list(steps(Activations, clip.tower, images, plan, workers=0))
    resumed = list(steps(Activations, clip.tower, images, plan, workers=0, skip=skip))
    assert len(resumed) == 12 - skip
    for one, two in zip(whole[skip:], resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_only_the_chunk_of_the_first_step_is_computed_again(numbers, marking_tower):
    plan = Plan(images=24, images_per_step=3, mixed_images=12, seed=0, epochs=1)
    assert len(list(steps(Activations, marking_tower, numbers(24), plan, workers=0, skip=6))) == 2
    assert sum(map(len, marking_tower.batches)) == 12


def test_worker_processes_change_nothing(clip, data_root):
    plan = Plan(images=48, images_per_step=8, mixed_images=16, seed=0, epochs=1)
    images = open_images(TRAIN, data_root, clip.transform())
    here, there = (list(steps(Activations, clip.tower, images, plan, workers=workers, skip=2)) for workers in (0, 1))
    assert len(here) == 4
    for one, two in zip(here, there, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("mixed_images", [4, 12])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_see_the_tokens_of_one(numbers, marking_tower, mixed_images, world):
    plan = Plan(images=30, images_per_step=4, mixed_images=mixed_images, seed=0, epochs=2)
    one = [marks(step) for step in steps(Activations, marking_tower, numbers(30), plan, workers=0, skip=3)]
    parts = []
    for rank in range(world):
        marking_tower.batches.clear()
        mine = steps(Activations, marking_tower, numbers(30), plan, workers=0, skip=3, rank=rank, world=world)
        parts.append([marks(step) for step in mine])
        assert max(map(len, marking_tower.batches)) <= 2
        assert sum(map(len, marking_tower.batches)) <= 28 * 2 * 0.6  # about its share, not all
    for whole, *shares in zip(one, *parts, strict=True):
        assert sorted(mark for share in shares for mark in share) == sorted(whole)


def test_broken_images_do_not_change_the_length_of_a_step(numbers, marking_tower):
    plan = Plan(images=12, images_per_step=4, mixed_images=8, seed=0, epochs=1)
    images = numbers(12, broken={5, 6}, max_broken=0.2)
    step_marks = [marks(step) for step in steps(Activations, marking_tower, images, plan, workers=0)]
    assert [len(step) for step in step_marks] == [20, 20, 20]
    assert images.broken.keys() == {"number 5", "number 6"}
    served = sorted(mark for step in step_marks for mark in step)
    assert served == sorted((7 if n in (5, 6) else n, token) for n in range(12) for token in range(5))


def test_towers_precision_is_the_callers_choice(clip, data_root):
    plan = Plan(images=48, images_per_step=8, mixed_images=16, seed=0, epochs=1)
    images = open_images(TRAIN, data_root, clip.transform())
    full = next(steps(Activations, clip.tower, images, plan, workers=0))
    half = next(
        steps(Activations, clip.tower, images, plan, workers=0, context=lambda: torch.autocast("cpu", torch.bfloat16))
    )
    assert half.mlp_in.dtype == half.mlp_out.dtype == torch.float32
    assert not torch.equal(full.mlp_in, half.mlp_in)
    assert torch.cosine_similarity(full.mlp_in, half.mlp_in, dim=-1).min() > 0.99


def test_nothing_lies_on_disk_by_default(numbers, marking_tower, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(steps(Activations, marking_tower, numbers(8), Plan(8, 2, 4, 0, epochs=2), workers=0))
    assert list(tmp_path.iterdir()) == []
