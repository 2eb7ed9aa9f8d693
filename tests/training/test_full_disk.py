"""Training on a disk that is full: it says so, what is whole stays, and the same call goes on once there is room."""

import errno
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.summary.writer import record_writer

from common import timeless
from faults import everything, fail, largest_file
from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.bundle.manifest import Preprocessing
from vitrine.models.export.export import export_bundle
from vitrine.models.files.errors import FileError
from vitrine.training.cards.build import Options, build_cards
from vitrine.training.cards.pictures import Album
from vitrine.training.checkpoint import CheckpointMeta, checkpoints, latest, load_tensors, save_checkpoint
from vitrine.training.data.images import DataError, load
from vitrine.training.run.progress import StepMetrics, track_progress
from vitrine.training.run.run import train

QUIET = Console(quiet=True)
METRICS = StepMetrics(0.5, 0.5, 8.0, 0, 1e-3, r2_by_layer=[0.5], l0_by_layer=[8.0])


@pytest.fixture
def save(recipe, clip, clt, tmp_path):
    """save(step) -> the checkpoint of that step in the run `tmp_path`."""

    def save(step):
        meta = CheckpointMeta(step=step, steps=24, recipe=recipe, clip_sha256=clip.sha256, layers=3, width=32)
        return save_checkpoint(tmp_path, meta, clt, {"out_mean_cls": torch.zeros(3, 32)}, {"step": torch.tensor(step)})

    return save


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_goes_on_from_its_last_whole_checkpoint(recipe, clip, data_root, tmp_path):
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": 2})})
    whole = train(recipe, clip, data_root, tmp_path / "whole", QUIET)
    out = tmp_path / "run"
    train(recipe, clip, data_root, out, QUIET, max_steps=5)
    before = {name: data for name, data in everything(out).items() if name.startswith("step-")}
    with (
        pytest.raises(FileError, match=rf"^{out}/step-00000006 cannot be written: File too large"),
        largest_file(50_000),
    ):
        train(recipe, clip, data_root, out, QUIET)
    assert {name: data for name, data in everything(out).items() if name.startswith("step-")} == before
    assert names(out) == ["log.jsonl", "step-00000003", "step-00000005", "tensorboard"]
    resumed = train(recipe, clip, data_root, out, QUIET)
    for name in ("clt.safetensors", "state.safetensors"):
        one, two = load_tensors(whole / name), load_tensors(resumed / name)
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert timeless(out / "log.jsonl") == timeless(tmp_path / "whole" / "log.jsonl")


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS])
def test_checkpoints_where_folders_cannot_be_renamed(save, tmp_path, monkeypatch, code):
    expected = everything(save(1))
    fail(monkeypatch, os, "rename", code)
    assert everything(save(2)).keys() == expected.keys()
    fail(monkeypatch, os, "replace", errno.ENOSPC, lambda old, new: new.name == "checkpoint.json")
    with pytest.raises(FileError, match="No space left on device"):
        save(3)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_what_a_kill_left_of_a_checkpoint_is_replaced(save, tmp_path):
    (tmp_path / "step-00000003").mkdir()  # moved file by file, checkpoint.json not yet
    (tmp_path / "step-00000003" / "clt.safetensors").write_bytes(b"half")
    assert latest(save(3)) == tmp_path / "step-00000003"
    assert load_tensors(tmp_path / "step-00000003" / "state.safetensors")["step"] == 3


def test_an_old_checkpoint_that_is_half_removed_is_none(save, tmp_path, monkeypatch):
    for step in (1, 2):
        save(step)
    monkeypatch.setattr("vitrine.training.checkpoint.shutil.rmtree", lambda path, ignore_errors: None)
    save(3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert (tmp_path / "step-00000001" / "clt.safetensors").exists()


def test_the_log(tmp_path):
    with pytest.raises(FileError, match=rf"^{tmp_path}/log.jsonl cannot be written: File too large"):
        follow(tmp_path, 9, largest_file(200))


def test_tensorboard(tmp_path, monkeypatch, capfd):
    """Its thread's error is ours, and not printed a second time."""
    write = record_writer.RecordWriter.write
    fail(monkeypatch, record_writer.RecordWriter, "write", errno.ENOSPC, lambda writer, data: b"loss" in data)
    with pytest.raises(FileError, match=rf"^{tmp_path}/tensorboard cannot be written: No space left"):
        follow(tmp_path, 40)
    assert write is not record_writer.RecordWriter.write
    assert capfd.readouterr().err == ""


def follow(out, steps, limit=None):
    with track_progress(out, 0, 40, QUIET, first=True, wandb_project=None, name="test") as report:
        for step in range(1, steps + 1):
            report.add(step, METRICS, 100)
        if limit is None:
            return report.flush()
        with limit:
            return report.flush()


def test_pictures_are_written_not_mapped(tmp_path):
    """A write to a memory map of a full disk would end the process."""
    preprocessing = Preprocessing(
        size=(32, 32), mean=(0.5,) * 3, std=(0.2,) * 3, interpolation="bicubic", resize_mode="squash"
    )
    with pytest.raises(FileError, match=rf"^{tmp_path}/p.npy cannot be written: File too large"), largest_file(2000):
        Album(tmp_path / "p.npy", preprocessing, 4, "thumbnails")
    assert names(tmp_path) == []
    album = Album(tmp_path / "p.npy", preprocessing, 4, "thumbnails")
    album.add(0, torch.zeros(2, 3, 32, 32))
    with pytest.raises(FileError, match=rf"^{tmp_path}/p.npy cannot be written: File too large"), largest_file(2000):
        album.add(2, torch.zeros(2, 3, 32, 32))
    album = Album(tmp_path / "p.npy", preprocessing, 4, "thumbnails")
    album.add(2, torch.ones(2, 3, 32, 32))
    stored = np.load(tmp_path / "p.npy")
    assert stored.shape == (4, 32, 32, 3)
    assert (stored[:2] == 128).all()
    assert (stored[2:] == 178).all()


def test_cards(clip, checkpoint, bundle, data_root, tmp_path, monkeypatch):
    """Full while the survey is saved, and while the bundle is written; then where folders cannot be renamed."""
    options = Options(images=16, held_out=4, exemplars=4, shown=3, references=8, codes=8, workers=0)
    options = replace(options, vocabulary=("labels",))

    def build():
        return build_cards(clip, checkpoint, bundle, data_root, tmp_path / "out", options, QUIET)

    for size, file, left in (
        (200_000, "survey.safetensors", ["pictures.npy"]),
        (1_500_000, "bundle", ["bundle", "pictures.npy", "survey.safetensors"]),
    ):
        with (
            largest_file(size),
            pytest.raises(FileError, match=rf"out.partial/{file} cannot be written: File too large"),
        ):
            build()
        assert names(tmp_path / "out.partial") == left
        assert not (tmp_path / "out").exists()
    fail(monkeypatch, os, "rename", errno.EXDEV)
    assert open_bundle(build().path).cards.card(0, 0)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("free", [0, 100_000])
def test_shared_memory_is_full(numbers, monkeypatch, free):
    """A process that hands over images there must not fail: the main process would wait for ever."""
    fixed = os.statvfs("/dev/shm")
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result([*fixed[:4], free // fixed.f_frsize, *fixed[5:]]))
    batches = [[0, 1], [2, 3]]
    assert len(list(load(numbers(4), batches, workers=0))) == 2
    if free:
        assert len(list(load(numbers(4), batches, workers=1))) == 2
    with pytest.raises(
        DataError, match=r"^/dev/shm has 0\.\d MB free, but a batch needs 0\.0 MB, since .* `workers = 0`$"
    ):
        list(load(numbers(4), batches, workers=2))


@pytest.mark.usefixtures("remembered_conversions")
def test_export(clip, clt, cls_mean, provenance, tmp_path):
    with largest_file(100_000), pytest.raises(FileError, match=rf"^{tmp_path}/out cannot be written: File too large"):
        export_bundle(clip, clt, cls_mean, provenance, tmp_path / "out")
    assert names(tmp_path) == []
