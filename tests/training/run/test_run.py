"""A run is a function of its recipe alone, however often it is interrupted."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from common import timeless
from vitrine.models.clip.loading import load_clip
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.replacement import Replacement
from vitrine.models.stopping import Stopped
from vitrine.training.checkpoint import CheckpointError, checkpoints, latest, load_clt, load_tensors, read_meta
from vitrine.training.data.held_out import held_out
from vitrine.training.data.images import DataError
from vitrine.training.data.normalisation import Normalisation
from vitrine.training.data.stream import steps
from vitrine.training.evaluation.evaluate import evaluate_summary
from vitrine.training.recipes.image_sources import FolderSource
from vitrine.training.recipes.reading import load_recipe
from vitrine.training.recipes.recipe import CascadeSection
from vitrine.training.run import clt_learner
from vitrine.training.run import run as run_module
from vitrine.training.run.run import train
from vitrine.training.run.trainer import TrainingDiverged

QUIET = Console(quiet=True)


@pytest.fixture
def start(recipe, clip, data_root):
    """start(out, **changes): `train` the tiny recipe, 24 steps, into `out`."""

    def start(out, recipe=recipe, clip=clip, max_steps=None):
        return train(recipe, clip, data_root, out, QUIET, max_steps=max_steps)

    return start


@pytest.fixture(scope="module")
def straight(recipe, clip, data_root, tmp_path_factory):
    """The folder of an uninterrupted run from start to end."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    train(recipe, clip, data_root, out, QUIET)
    return out


def test_a_run_warns_of_labels_and_of_a_tokenizer_that_no_bundle_can_have(clip):
    warnings = run_module._label_warnings(clip, ["Cat", "cat"], ["a {}"])
    assert [text.partition(" are the same")[0] for text in warnings] == ['"Cat" and "cat"']
    (warning,) = run_module._label_warnings(replace(clip, tokenizer=object()), ["cat"], ["a {}"])
    assert warning == "cannot convert a tokenizer of type object. No bundle can be exported"


def log(out):
    return timeless(out / "log.jsonl")


def assert_same_bits(checkpoint, other):
    for name in ("clt.safetensors", "state.safetensors"):
        one, two = load_tensors(checkpoint / name), load_tensors(other / name)
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == []


def change(recipe, section, **values):
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def test_r2_at_fixed_steps(straight):
    """If this changes, training is no longer the same: find out whether it improved before pinning new values."""
    r2 = {line["step"]: line["r2"] for line in log(straight)}
    assert [r2[step] for step in (3, 6, 12, 24)] == pytest.approx([0.352, 0.546, 0.769, 0.867], abs=0.005)


def test_run_keeps_a_log_and_its_newest_checkpoints(straight, recipe, clip):
    assert [line["step"] for line in log(straight)] == list(range(1, 25))
    assert [read_meta(checkpoint).step for checkpoint in checkpoints(straight)] == [21, 24]
    meta = read_meta(latest(straight))
    assert (meta.steps, meta.recipe, meta.clip_sha256, meta.train_images) == (24, recipe, clip.sha256, 48)


def test_finished_run_is_measured_on_val(straight, recipe, clip, data_root):
    clt, _, meta = load_clt(latest(straight))
    images = held_out(recipe.data, data_root, clip)
    assert meta.val_images == len(images) == 12
    assert meta.metrics == evaluate_summary(clip, clt, images, recipe.data.templates, QUIET)
    assert meta.metrics.r2 > 0.3


VARIANTS = {
    "abs_topk": {"sparsifier": "abs_topk"},
    "jumprelu": {"sparsifier": "jumprelu"},
    "batch_topk": {"sparsifier": "batch_topk"},
    "per_layer": {"cross_layer": False},
    "budgets": {"k": (8, 4, 6), "k_cls": (2, 3, 4)},
}


@pytest.mark.parametrize("variant", [*VARIANTS, "narrowing", "reviving", "cascade", "cache", "bf16"])
def test_every_kind_of_run_can_be_resumed(start, recipe, tmp_path, variant):
    """Interrupted twice, once in each phase where there are two: the same bits as without interruption."""
    if variant in VARIANTS:
        recipe = change(recipe, "clt", **VARIANTS[variant])
    settings = {
        "narrowing": {"k_start": 2.0, "k_anneal_share": 0.8},
        "reviving": {"revive_after": 1},
        "cache": {"cache": "float32"},
        "bf16": {"precision": "bf16-mixed"},
    }.get(variant, {})
    recipe = change(recipe, "training", epochs=2, **settings)
    if variant == "cascade":
        recipe = recipe.model_copy(update={"cascade": CascadeSection(steps=5, images_per_step=4)})
    whole = start(tmp_path / "whole", recipe)
    start(tmp_path / "parts", recipe, max_steps=5)
    start(tmp_path / "parts", recipe, max_steps=9)
    parts = start(tmp_path / "parts", recipe)
    assert read_meta(parts).step == (17 if variant == "cascade" else 12)
    assert_same_bits(parts, whole)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert variant != "reviving" or any(line["dead"] for line in log(tmp_path / "whole"))


def test_cache_changes_nothing(straight, start, recipe, tmp_path):
    assert_same_bits(start(tmp_path, change(recipe, "training", cache="float32")), latest(straight))
    assert list((tmp_path / "activations").glob("chunk-*"))
    assert not (straight / "activations").exists()


def test_finished_reconstruction_may_be_given_a_cascade(start, recipe, tmp_path):
    recipe = change(recipe, "training", epochs=1)
    with_cascade = recipe.model_copy(update={"cascade": CascadeSection(steps=4, images_per_step=8)})
    assert read_meta(start(tmp_path / "late", recipe)).step == 6
    late = start(tmp_path / "late", with_cascade)
    assert read_meta(late).step == 10
    assert_same_bits(late, start(tmp_path / "whole", with_cascade))
    assert load_tensors(late / "state.safetensors")["adam.encoders.0.weight.step"] == 10  # the moments are carried over
    longer = with_cascade.model_copy(update={"cascade": CascadeSection(steps=5, images_per_step=8)})
    with pytest.raises(CheckpointError, match=r"cascade\.steps is 4 there and 5 here"):
        start(tmp_path / "late", longer)


def test_cascade_helps_the_cascade(start, recipe, tmp_path, clip, make_pixels):
    recipe = change(recipe, "training", epochs=2)
    before, _, _ = load_clt(start(tmp_path / "one", recipe))
    cascade = CascadeSection(steps=30, images_per_step=8, learning_rate=3e-3, warmup_steps=2)
    after, _, _ = load_clt(start(tmp_path / "two", recipe.model_copy(update={"cascade": cascade})))

    def distance(clt):
        pixels = make_pixels(8, seed=11)
        embeddings = clip.tower.head(Replacement(clip.tower, clt)(pixels, range(3)).residual[:, 0])
        return (embeddings - clip.model.encode_image(pixels)).square().mean()

    assert distance(after) < 0.9 * distance(before)


def test_killed_process_can_be_resumed_at_any_step(recipe_path, data_root, straight, tmp_path):
    """kill -9, three times, at arbitrary points; the fourth process finishes the run."""
    command = [sys.executable, "-m", "vitrine", "train", "--recipe", str(recipe_path), "--data-root", str(data_root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "killed"
    for target in (2, 9, 16):
        process = subprocess.Popen([*command, "--out", str(out)], env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and _step(out) < target:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert _step(out) < 24
    subprocess.run([*command, "--out", str(out)], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert_same_bits(latest(out), latest(straight))


def test_a_signal_ends_a_run_after_the_step_in_hand(start, straight, tmp_path, monkeypatch):
    """SIGTERM in a step that no checkpoint is due after; the same call then ends with the same bits."""
    before = signal.getsignal(signal.SIGTERM)

    def told(batch):
        signal.raise_signal(signal.SIGTERM)
        return batch

    with monkeypatch.context() as patch:
        interrupt(patch, 7, told)
        with pytest.raises(Stopped) as stopped:
            start(tmp_path)
    saved = tmp_path / "step-00000008"
    assert str(stopped.value) == (
        f"stopped by SIGTERM: {saved} is written (step 8 of 24); run the same command again to continue from there"
    )
    assert stopped.value.status == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert latest(tmp_path) == saved
    assert [line["step"] for line in log(tmp_path)] == list(range(1, 9))
    assert_same_bits(start(tmp_path), latest(straight))


def test_processes_that_are_told_to_stop_say_how_to_go_on(recipe_path, data_root, tmp_path):
    """Two, of which the first alone gets the signal."""
    command = [sys.executable, "-m", "vitrine", "train", "--recipe", str(recipe_path), "--data-root", str(data_root)]
    command += ["--set", "training.epochs=1000", "--devices", "2", "--accelerator", "cpu"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and _step(tmp_path) < 3:
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    last = said.strip().splitlines()[-1]
    assert last == (
        f"stopped by SIGTERM: {latest(tmp_path)} is written (step {_step(tmp_path):,} of 6,000); "
        "run the same command again to continue from there"
    )
    assert "Traceback" not in said


def _step(out):
    """The step that a run has reached, by its checkpoints."""
    saved = checkpoints(out)
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def test_broken_images_are_named(start, recipe, tmp_path, data_root, clip):
    root = tmp_path / "data"
    shutil.copytree(data_root, root)
    broken = sorted((root / "train" / "red circle").iterdir())[3]
    broken.write_bytes(b"no image")
    recipe = change(recipe, "data", max_broken=0.05)
    said = io.StringIO()
    checkpoint = train(recipe, clip, root, tmp_path / "run", Console(file=said))
    assert list(read_meta(checkpoint).broken) == [str(broken)]
    assert f"1 of 48 images could not be read and were replaced by the next ones: names and reasons: {checkpoint}" in (
        said.getvalue()
    )
    with pytest.raises(DataError, match=broken.name):
        train(change(recipe, "data", max_broken=0.0), clip, root, tmp_path / "other", QUIET)


def test_curves_are_written_for_tensorboard(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(straight / "tensorboard"))
    events.Reload()
    names = {"loss", "r2", "l0", "dead", "rate", "r2/layer_00", "l0/layer_02", "tokens_per_second"}
    assert names <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("r2")] == [20]
    assert events.Scalars("r2")[0].value == pytest.approx(log(straight)[19]["r2"])


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_resumed_run_ends_with_the_same_bits(straight, start, tmp_path, recipe_path, write_clip, steps):
    assert read_meta(start(tmp_path, max_steps=steps)).step == steps
    config, weights = write_clip()
    whole = start(tmp_path, load_recipe(recipe_path), load_clip(None, str(weights), config))  # everything is read again
    assert_same_bits(whole, latest(straight))
    assert read_meta(whole) == read_meta(latest(straight))


def interrupt(monkeypatch, at, what):
    """Let the stream of training batches yield `what(batch)` instead of batch number `at`."""

    def interrupted(*arguments, **options):
        for number, batch in enumerate(steps(*arguments, **options)):
            yield what(batch) if number == at else batch

    monkeypatch.setattr(run_module, "steps", interrupted)


def test_killed_run_resumes_from_its_last_checkpoint(straight, start, tmp_path, monkeypatch):
    def kill(_batch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        interrupt(patch, 10, kill)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path)
    assert read_meta(latest(tmp_path)).step == 9
    assert_same_bits(start(tmp_path), latest(straight))


def test_finished_run_is_neither_trained_on_nor_measured_again(straight, start, monkeypatch):
    monkeypatch.setattr(clt_learner, "evaluate_summary", None)
    before = log(straight)
    assert read_meta(start(straight)).step == 24
    assert log(straight) == before


def test_run_that_was_killed_while_it_was_measured_is_measured_then(straight, start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(clt_learner, "evaluate_summary", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(tmp_path)
    assert read_meta(latest(tmp_path)).metrics.r2 is None
    assert read_meta(start(tmp_path)).metrics == read_meta(latest(straight)).metrics


def test_seed_decides_the_weights(straight, start, tmp_path, recipe):
    other = start(tmp_path, change(recipe, "training", seed=1))
    ours, theirs = (load_clt(checkpoint)[0].encoders[0].weight for checkpoint in (other, latest(straight)))
    assert not torch.allclose(ours, theirs)


def test_checkpoint_is_folded_from_its_own_state(straight):
    clt, out_mean_cls, _ = load_clt(latest(straight))
    state = load_tensors(latest(straight) / "state.safetensors")
    section = {name: state[f"normalisation.{name}"] for name in Normalisation.__dataclass_fields__}
    trained = CrossLayerTranscoder(clt.architecture)
    trained.load_state_dict({key.removeprefix("clt."): state[key] for key in state if key.startswith("clt.")})
    for name, tensor in Normalisation(**section).fold_into(trained).state_dict().items():
        assert torch.equal(clt.state_dict()[name], tensor)
    assert torch.equal(out_mean_cls, section["out_mean_cls"])


def test_folder_of_another_run_is_refused_by_what_differs(straight, start, recipe, clip):
    others = {
        "training.learning_rate is 0.01 there and 0.5 here": {"recipe": change(recipe, "training", learning_rate=0.5)},
        "clt.k is 8 there and 4 here": {"recipe": change(recipe, "clt", k=(4,))},
        'data.train.path is "train" there and "val" here; it had 48 train images, now there are 12': {
            "recipe": change(recipe, "data", train=recipe.data.val)
        },
        "the CLIP has other weights": {"clip": replace(clip, sha256="0" * 64)},
    }
    before = latest(straight)
    for different, changes in others.items():
        with pytest.raises(CheckpointError) as refused:
            start(straight, **changes)
        assert str(refused.value) == (
            f"{before} belongs to another run ({different}): give the same recipe, or choose an empty --out"
        )
    assert latest(straight) == before
    assert read_meta(before).recipe == recipe


def test_what_only_export_reads_may_change(start, tmp_path, recipe):
    start(tmp_path, max_steps=1)
    other = change(recipe, "bundle", description="Better words.")
    assert read_meta(start(tmp_path, other, max_steps=1)).recipe == other


def test_loss_that_is_no_number_ends_the_run_with_a_good_checkpoint(straight, start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 7, lambda batch: batch._replace(mlp_out=batch.mlp_out * torch.nan))
        with pytest.raises(TrainingDiverged, match="loss is nan at step 7; lower the learning rate"):
            start(tmp_path)
    clt, _, meta = load_clt(latest(tmp_path))
    assert meta.step == 6
    assert all(parameter.isfinite().all() for parameter in clt.parameters())
    assert_same_bits(start(tmp_path), latest(straight))


@pytest.mark.parametrize("wrong", [{"val": FolderSource(kind="folder", path="nowhere")}, {"labels": ("cat", "dog")}])
def test_val_split_that_cannot_be_measured_is_reported_before_training(start, tmp_path, recipe, wrong):
    with pytest.raises(DataError):
        start(tmp_path, change(recipe, "data", **wrong))
    assert not (tmp_path / "log.jsonl").exists()
