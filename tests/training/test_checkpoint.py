"""Checkpoints are complete or absent, and describe themselves."""

import json

import pytest
import torch

from vitrine.models.bundle.manifest import Metrics
from vitrine.training.checkpoint import (
    CHECKPOINTS_KEPT,
    CheckpointError,
    CheckpointMeta,
    checkpoints,
    latest,
    load_clt,
    load_tensors,
    read_meta,
    save_checkpoint,
    write_meta,
)


@pytest.fixture
def meta(recipe, clip):
    return CheckpointMeta(
        step=7, steps=24, recipe=recipe, clip_sha256=clip.sha256, layers=3, width=32, metrics=Metrics(r2=0.5)
    )


@pytest.fixture
def save(tmp_path, meta, clt):
    """save(step) -> the checkpoint of that step in the run `tmp_path`."""

    def save(step):
        extras, state = {"out_mean_cls": torch.full((3, 32), 2.0)}, {"adam.0.step": torch.tensor(float(step))}
        return save_checkpoint(tmp_path, meta.model_copy(update={"step": step}), clt, extras, state)

    return save


def edit(checkpoint, **changes):
    path = checkpoint / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip(save, meta, clt):
    checkpoint = save(7)
    loaded, out_mean_cls, read = load_clt(checkpoint)
    assert read == meta
    assert loaded.architecture == clt.architecture
    for name, tensor in clt.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(out_mean_cls, torch.full((3, 32), 2.0))
    assert load_tensors(checkpoint / "state.safetensors")["adam.0.step"] == 7


def test_checkpoints_from_before_there_were_kinds_are_of_a_clt(save, meta):
    checkpoint = save(7)
    recipe = json.loads((checkpoint / "checkpoint.json").read_text())["recipe"]
    assert recipe.pop("kind") == "clt"
    edit(checkpoint, recipe=recipe)
    assert load_clt(checkpoint)[2] == meta


def test_only_the_newest_are_kept_in_the_order_of_steps(save, tmp_path):
    for step in (2, 9, 10, 100, 99_999):
        save(step)
    kept = checkpoints(tmp_path)
    assert [read_meta(checkpoint).step for checkpoint in kept] == [100, 99_999]
    assert len(kept) == CHECKPOINTS_KEPT
    assert latest(tmp_path) == kept[-1]
    assert latest(kept[0]) == kept[0]


def test_what_is_known_later_is_added(save, tmp_path, meta):
    checkpoint = save(7)
    meta.metrics = Metrics(r2=0.75)
    write_meta(checkpoint, meta)
    assert [read_meta(checkpoint).metrics.r2 for checkpoint in checkpoints(tmp_path)] == [0.75]
    assert {file.name for file in checkpoint.iterdir()} == {"checkpoint.json", "clt.safetensors", "state.safetensors"}


def test_half_written_checkpoint_is_ignored_and_replaced(save, tmp_path):
    whole = save(7)
    partial = tmp_path / ".step-00000009.partial"
    partial.mkdir()
    for name in ("checkpoint.json", "leftover"):
        (partial / name).write_text("half")
    (tmp_path / "step-00000008").mkdir()  # without its checkpoint.json
    assert checkpoints(tmp_path) == [whole]
    assert latest(tmp_path) == whole
    newest = save(9)
    assert sorted(file.name for file in newest.iterdir()) == [
        "checkpoint.json",
        "clt.safetensors",
        "state.safetensors",
    ]
    assert not partial.exists()


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_missing_checkpoint_is_reported(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path / name}"):
        latest(tmp_path / name)


def test_other_format_is_refused(save):
    checkpoint = save(7)
    edit(checkpoint, format=1)
    with pytest.raises(CheckpointError, match=f"{checkpoint} has format 1; this version reads 2"):
        load_clt(checkpoint)


LONG = pytest.param(f'{{"format": 2, "{"x" * 9_999}": 1}}', id="long")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', LONG])
def test_invalid_meta_is_refused(save, content):
    checkpoint = save(7)
    (checkpoint / "checkpoint.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"checkpoint.json was not written by Vitrine: [^\n]{1,240}$"):
        read_meta(checkpoint)


def test_unknown_field_is_refused(save):
    checkpoint = save(7)
    edit(checkpoint, colour="red")
    with pytest.raises(CheckpointError, match="colour"):
        read_meta(checkpoint)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_weights_are_named(save, damage):
    checkpoint = save(7)
    file = checkpoint / "clt.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"cannot read {file}"):
        load_clt(checkpoint)
