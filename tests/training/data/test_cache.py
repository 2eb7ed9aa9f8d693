"""A cache changes where activations come from, and nothing else; the cache of another run is refused."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vitrine.training.data import cache as cache_module
from vitrine.training.data.activations import Activations, Residuals
from vitrine.training.data.cache import CacheError, cache_bytes, open_cache
from vitrine.training.data.images import DataError, Plan
from vitrine.training.data.sources import open_images
from vitrine.training.data.stream import steps
from vitrine.training.recipes.image_sources import FolderSource

SOURCE = FolderSource(kind="folder", path="train")
PLAN = Plan(images=23, images_per_step=3, mixed_images=9, seed=0, epochs=3)  # chunks of 9, 9 and 3 images


@pytest.fixture
def marking_clip(marking_tower):
    return SimpleNamespace(tower=marking_tower, sha256="a" * 64, preprocess={"size": (2, 2), "mean": (0.5, 0.5, 0.5)})


@pytest.fixture
def start(marking_clip, tmp_path):
    """start(**changes) -> the cache in tmp_path/"cache", with its arguments changed."""

    def start(dtype="float32", plan=PLAN, **changes):
        arguments = {"clip": marking_clip, "source": SOURCE, "plan": plan, "log": lambda message: None} | changes
        return open_cache(Activations, tmp_path / "cache", dtype, **arguments)

    return start


def run(tower, images, plan=PLAN, **options):
    if hasattr(tower, "batches"):  # a marking tower
        tower.batches.clear()
    return list(steps(Activations, tower, images, plan, workers=0, **options))


def assert_same_bits(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def shards(tmp_path):
    return sorted((tmp_path / "cache").glob("chunk-*"))


def test_float32_cache_gives_the_same_bits(clip, data_root, tmp_path):
    plan = Plan(images=48, images_per_step=8, mixed_images=32, seed=0, epochs=2)
    images = open_images(SOURCE, data_root, clip.transform())
    plain = run(clip.tower, images, plan)
    cache = open_cache(Activations, tmp_path / "cache", "float32", clip=clip, source=SOURCE, plan=plan)
    assert_same_bits(run(clip.tower, images, plan, cache=cache), plain)
    assert_same_bits(run(clip.tower, images, plan, cache=cache, skip=5), plain[5:])


def test_streams_are_cached_by_themselves(clip, data_root, tmp_path):
    """The same bits; and neither kind reads what is the other's."""
    plan = Plan(images=48, images_per_step=8, mixed_images=32, seed=0, epochs=2)
    images = open_images(SOURCE, data_root, clip.transform())
    plain = list(steps(Residuals, clip.tower, images, plan, workers=0))
    arguments = {"clip": clip, "source": SOURCE, "plan": plan}
    cache = open_cache(Residuals, tmp_path / "cache", "float32", **arguments)
    assert_same_bits(list(steps(Residuals, clip.tower, images, plan, workers=0, cache=cache)), plain)
    assert_same_bits(list(steps(Residuals, clip.tower, images, plan, workers=0, cache=cache, skip=5)), plain[5:])
    size = sum(path.stat().st_size for path in shards(tmp_path))
    assert 0 < size - cache_bytes(Residuals, plan, clip.tower, "float32") < 2 * 1024
    for kind, folder in ((Activations, "cache"), (Residuals, "other")):
        open_cache(Activations, tmp_path / "other", "float32", **arguments)
        with pytest.raises(CacheError, match="activations made with a different tensors"):
            open_cache(kind, tmp_path / folder, "float32", **arguments)


def test_a_chunk_is_forwarded_once(numbers, marking_tower, start, tmp_path):
    plain = run(marking_tower, numbers(23))
    assert sum(map(len, marking_tower.batches)) == 3 * 21
    assert_same_bits(run(marking_tower, numbers(23), cache=start()), plain)
    assert sum(map(len, marking_tower.batches)) == 21
    assert len(shards(tmp_path)) == 3
    assert_same_bits(run(marking_tower, numbers(23), cache=start(), skip=10), plain[10:])
    assert marking_tower.batches == []


def test_interrupted_run_resumes_with_what_is_cached(numbers, marking_tower, start, tmp_path):
    plain = run(marking_tower, numbers(23))
    first = steps(Activations, marking_tower, numbers(23), PLAN, workers=0, cache=start())
    for _ in range(4):
        next(first)
    first.close()
    kept = len(shards(tmp_path))
    assert 0 < kept < 3
    assert_same_bits(run(marking_tower, numbers(23), cache=start(), skip=2), plain[2:])
    assert 0 < sum(map(len, marking_tower.batches)) < 21


def test_bfloat16_rounds_from_the_first_visit_on(clip, data_root, tmp_path):
    plan = Plan(images=48, images_per_step=8, mixed_images=16, seed=0, epochs=1)
    images = open_images(SOURCE, data_root, clip.transform())
    plain = run(clip.tower, images, plan)
    cache = open_cache(Activations, tmp_path / "cache", "bfloat16", clip=clip, source=SOURCE, plan=plan)
    for _visit in ("first", "second"):
        for one, two in zip(plain, run(clip.tower, images, plan, cache=cache), strict=True):
            assert torch.equal(one.mlp_in.bfloat16().float(), two.mlp_in)
            assert torch.equal(one.mlp_out.bfloat16().float(), two.mlp_out)
            assert torch.equal(one.is_cls, two.is_cls)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_size_is_known_beforehand(numbers, marking_tower, start, tmp_path, dtype):
    run(marking_tower, numbers(23), cache=start(dtype))
    size = sum(path.stat().st_size for path in shards(tmp_path))
    expected = cache_bytes(Activations, PLAN, marking_tower, dtype)
    assert expected == 2 * 2 * 21 * 5 * 2 * {"float32": 4, "bfloat16": 2}[dtype]
    assert expected < size < expected + 3 * 1024  # the headers


def test_every_process_has_its_own_files(numbers, marking_tower, start, tmp_path):
    for rank in (0, 1):
        share = {"rank": rank, "world": 2}
        plain = run(marking_tower, numbers(23), **share)
        assert_same_bits(run(marking_tower, numbers(23), cache=start(**share), **share), plain)
        assert_same_bits(run(marking_tower, numbers(23), cache=start(**share), **share), plain)
        assert marking_tower.batches == []
    assert len(shards(tmp_path)) == 6


def _truncate(path):
    os.truncate(path, path.stat().st_size - 3)


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no tensors, but more than eight bytes"),
        lambda path: path.write_bytes(path.with_name("chunk-00002-process-0-of-1.safetensors").read_bytes()),
    ],
    ids=["cut short", "empty", "garbage", "another chunk's"],
)
@pytest.mark.parametrize("when", ["before", "during"])
def test_damaged_file_is_computed_again_and_reported_once(numbers, marking_tower, start, tmp_path, damage, when):
    plain = run(marking_tower, numbers(23))
    messages = []
    if when == "before":
        run(marking_tower, numbers(23), cache=start())
        damage(shards(tmp_path)[0])
    marking_tower.batches.clear()
    served = []
    for number, step in enumerate(
        steps(Activations, marking_tower, numbers(23), PLAN, workers=0, cache=start(log=messages.append))
    ):
        if when == "during" and number == 7:  # the first epoch is over
            damage(shards(tmp_path)[0])
        served.append(step)
    assert_same_bits(served, plain)
    assert sum(map(len, marking_tower.batches)) == (9 if when == "before" else 21 + 9)
    assert len(messages) == 1
    assert messages[0].startswith(f"{shards(tmp_path)[0]} is damaged")
    assert start().readable_chunks() == {0, 1, 2}


def test_files_that_vanish_are_computed_again(numbers, marking_tower, start, tmp_path):
    plain = run(marking_tower, numbers(23))
    stream = steps(Activations, marking_tower, numbers(23), PLAN, workers=0, cache=start())
    first = [next(stream) for _ in range(7)]
    for path in shards(tmp_path):
        path.unlink()
    assert_same_bits(first + list(stream), plain)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"source": FolderSource(kind="folder", path="other")}, "source"),
        ({"plan": replace(PLAN, images=24)}, "plan"),
        ({"plan": replace(PLAN, images_per_step=9)}, "plan"),
        ({"plan": replace(PLAN, mixed_images=12)}, "plan"),
        ({"plan": replace(PLAN, seed=1)}, "plan"),
        ({"precision": "bf16-mixed"}, "precision"),
        ({"world": 2, "rank": 1}, "processes"),
    ],
)
def test_cache_of_another_run_is_refused(start, tmp_path, changes, name):
    start()
    start(plan=replace(PLAN, epochs=9))  # a longer run has the same chunks
    with pytest.raises(CacheError, match=rf"^{tmp_path}/cache holds activations made with a different {name}; delete"):
        start(**changes)


@pytest.mark.parametrize(
    ("change", "name"), [({"sha256": "b" * 64}, "CLIP"), ({"preprocess": {"size": (4, 4)}}, "preprocessing")]
)
def test_cache_of_another_clip_is_refused(start, marking_clip, change, name):
    start()
    with pytest.raises(CacheError, match=f"a different {name};"):
        start(clip=SimpleNamespace(**vars(marking_clip) | change))


def test_cache_of_another_version_is_refused(start, monkeypatch):
    start()
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    with pytest.raises(CacheError, match="a different format;"):
        start()


@pytest.mark.parametrize("content", ["", "[1]", '{"format": 1}', "\udcff"])
def test_cache_json_of_another_kind_is_refused(start, tmp_path, content):
    start()
    (tmp_path / "cache/cache.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CacheError, match=f"{tmp_path}/cache .*; delete it or choose another"):
        start()


def test_activations_of_unknown_origin_are_refused(numbers, marking_tower, start, tmp_path):
    run(marking_tower, numbers(23), cache=start())
    (tmp_path / "cache/cache.json").unlink()
    with pytest.raises(CacheError, match=r"without their cache\.json"):
        start()


def test_full_disk_is_reported_beforehand(numbers, marking_tower, start, monkeypatch):
    def free(count):
        monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=count))

    needed = cache_bytes(Activations, PLAN, marking_tower, "float32")
    free(needed - 1)
    with pytest.raises(CacheError, match="free some space, use bfloat16, or remove `cache`"):
        start()
    free(needed)
    run(marking_tower, numbers(23), cache=start())
    free(0)
    start()  # everything is there


def test_file_that_cannot_be_written_is_named(numbers, marking_tower, start, tmp_path):
    cache = start()
    (tmp_path / "cache/cache.json").unlink()
    (tmp_path / "cache").rmdir()
    with pytest.raises(CacheError, match=rf"^{tmp_path}/cache/chunk-.* cannot be written: No such file"):
        run(marking_tower, numbers(23), cache=cache)


def test_nothing_half_written_is_left(numbers, marking_tower, start, tmp_path, monkeypatch):
    def out_of_space(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(cache_module, "save_file", out_of_space)
    with pytest.raises(CacheError, match="No space left"):
        run(marking_tower, numbers(23), cache=start())
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["cache.json"]


def test_broken_images_are_named_by_a_cached_run_too(numbers, marking_tower, start):
    broken = {"broken": {4, 17}, "max_broken": 0.1}
    first, second = numbers(23, **broken), numbers(23, **broken)
    assert_same_bits(run(marking_tower, first, cache=start()), run(marking_tower, second, cache=start()))
    assert marking_tower.batches == []
    assert first.broken == second.broken == {"number 4": "OSError: torn", "number 17": "OSError: torn"}
    with pytest.raises(DataError, match="images cannot be read"):
        run(marking_tower, numbers(23), cache=start())


def test_cache_json_can_be_read(start, tmp_path):
    start()
    content = json.loads((tmp_path / "cache/cache.json").read_text())
    assert content["CLIP"] == "a" * 64
    assert content["source"] == {"kind": "folder", "path": "train"}  # as before `classes`: old caches can be read
    assert content["plan"] == {"images": 23, "images_per_step": 3, "mixed_images": 9, "seed": 0}
