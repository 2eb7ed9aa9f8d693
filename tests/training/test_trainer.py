"""A run is a function of its recipe alone, however often it is interrupted."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.functional import cosine_similarity

from models.clip import load_clip
from models.clt import CrossLayerTranscoder
from training import trainer as trainer_module
from training.activations import Activations, Normalisation, stream
from training.checkpoint import CheckpointError, checkpoints, latest, load_clt, load_tensors, read_meta
from training.data import DataError, image_folder
from training.recipes import TrainingSection, load_recipe
from training.trainer import Trainer, TrainingDiverged, train

QUIET = Console(quiet=True)


@pytest.fixture
def start(recipe, clip, data_root):
    """start(out, **changes): `train` the tiny recipe, 24 steps, into `out`."""

    def start(out, recipe=recipe, clip=clip, max_steps=None):
        return train(recipe, clip, data_root, out, QUIET, max_steps)

    return start


@pytest.fixture(scope="module")
def straight(recipe, clip, data_root, tmp_path_factory):
    """The folder of a run from start to end in one go."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    train(recipe, clip, data_root, out, QUIET)
    return out


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_bits(checkpoint, other):
    for name in ("clt.safetensors", "state.safetensors"):
        one, two = load_tensors(checkpoint / name), load_tensors(other / name)
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == []


def change(recipe, section, **values):
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def test_r2_at_fixed_steps(straight):
    """If this moves, training is no longer the same: find out whether it became better before you pin it anew."""
    r2 = {line["step"]: line["r2"] for line in log(straight)}
    assert [r2[step] for step in (3, 6, 12, 24)] == pytest.approx([0.256, 0.576, 0.771, 0.853], abs=0.005)


def test_run_keeps_a_log_and_its_newest_checkpoints(straight, recipe, clip):
    assert [line["step"] for line in log(straight)] == list(range(1, 25))
    assert [read_meta(checkpoint).step for checkpoint in checkpoints(straight)] == [21, 24]
    meta = read_meta(latest(straight))
    assert (meta.steps, meta.recipe, meta.clip_sha256, meta.train_images) == (24, recipe, clip.sha256, 48)


def test_finished_run_is_measured_on_val(straight, recipe, clip, data_root):
    def r2(found, truth):
        spread = (truth - truth.mean(1, keepdim=True)).square().sum((1, 2))
        return (1 - (truth - found).square().sum((1, 2)) / spread).mean().item()

    clt, _, meta = load_clt(latest(straight))
    folder = image_folder(data_root / "val", clip.transform())
    pixels = torch.stack([pixels for pixels, _ in folder])
    taps = clip.tower(pixels)
    truth, code = taps.mlp_out.flatten(1, 2), clt.encode(taps.mlp_in.flatten(1, 2))
    found = clt.decode_dense(code)
    fired = torch.zeros(3, 64, dtype=torch.bool)
    for layer in range(3):
        fired[layer, code.indices[layer][code.values[layer] > 0]] = True
    labels = clip.encode_labels(folder.classes, list(recipe.data.templates))
    predicted = (clip.model.encode_image(pixels) @ labels.T).argmax(-1)

    metrics = meta.metrics
    assert meta.val_images == len(folder) == 12
    assert metrics.r2 == pytest.approx(r2(found, truth), abs=1e-4)
    assert metrics.r2_cls == pytest.approx(r2(found[:, ::17], truth[:, ::17]), abs=1e-4)
    assert metrics.cosine == pytest.approx(cosine_similarity(found, truth, dim=-1).mean().item(), abs=1e-4)
    assert metrics.dead_share == pytest.approx(1 - fired.float().mean().item(), abs=1e-6)
    assert metrics.zero_shot_top1 == pytest.approx((predicted == torch.tensor(folder.targets)).float().mean().item())


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_resumed_run_ends_with_the_same_bits(straight, start, tmp_path, recipe_path, write_clip, steps):
    assert read_meta(start(tmp_path, max_steps=steps)).step == steps
    config, weights = write_clip()
    whole = start(tmp_path, load_recipe(recipe_path), load_clip(None, str(weights), config))  # all read anew
    assert_same_bits(whole, latest(straight))
    assert read_meta(whole) == read_meta(latest(straight))


def interrupt(monkeypatch, at, what):
    """Let the stream of training batches do `what` in place of batch number `at`."""

    def interrupted(tower, batches):
        for number, batch in enumerate(stream(tower, batches)):
            yield what(batch) if number == at else batch

    monkeypatch.setattr(trainer_module, "stream", interrupted)


def test_killed_run_goes_on_from_its_last_checkpoint(straight, start, tmp_path, monkeypatch):
    def kill(_batch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        interrupt(patch, 10, kill)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path)
    assert read_meta(latest(tmp_path)).step == 9
    assert_same_bits(start(tmp_path), latest(straight))


def test_finished_run_is_not_trained_on(straight, start):
    before = log(straight)
    assert read_meta(start(straight)).step == 24
    assert log(straight) == before


def test_seed_decides_the_weights(straight, start, tmp_path, recipe):
    other = start(tmp_path, change(recipe, "training", seed=1))
    assert not torch.allclose(load_clt(other)[0].w_enc, load_clt(latest(straight))[0].w_enc)


def test_checkpoint_is_folded_from_its_own_state(straight):
    clt, out_mean_cls, _ = load_clt(latest(straight))
    state = load_tensors(latest(straight) / "state.safetensors")
    section = {name: state[f"normalisation.{name}"] for name in Normalisation.__dataclass_fields__}
    trained = CrossLayerTranscoder(3, 32, 64, 8)
    trained.load_state_dict({key.removeprefix("clt."): state[key] for key in state if key.startswith("clt.")})
    for name, tensor in Normalisation(**section).fold_into(trained).state_dict().items():
        assert torch.equal(clt.state_dict()[name], tensor)
    assert torch.equal(out_mean_cls, section["out_mean_cls"])


def test_folder_of_another_run_is_refused(straight, start, recipe, clip):
    others = {
        r"\[training\]": {"recipe": change(recipe, "training", learning_rate=0.5)},
        r"\[clt\]": {"recipe": change(recipe, "clt", k=4)},
        r"\[data\]": {"recipe": change(recipe, "data", train="val")},
        "CLIP": {"clip": replace(clip, sha256="0" * 64)},
    }
    before = latest(straight)
    for named, changes in others.items():
        with pytest.raises(CheckpointError, match=f"{before} was trained with another {named}; choose an empty --out"):
            start(straight, **changes)
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


@pytest.mark.parametrize("wrong", [{"val": "nowhere"}, {"labels": ("cat", "dog")}])
def test_val_split_that_cannot_be_measured_is_told_before_training(start, tmp_path, recipe, wrong):
    with pytest.raises(DataError):
        start(tmp_path, change(recipe, "data", **wrong))
    assert not (tmp_path / "log.jsonl").exists()


def make_trainer(clt, steps=10, **settings):
    zeros, ones = torch.zeros(clt.layers, clt.width), torch.ones(clt.layers)
    return Trainer(clt, Normalisation(zeros, ones, zeros, ones, zeros), TrainingSection(**settings), steps)


@pytest.fixture
def small():
    """(a CLT of 2 layers, a batch of 6 tokens for it, the first and fourth of them [CLS])."""
    clt = CrossLayerTranscoder(layers=2, width=4, features=6, k=3)
    generator = torch.Generator().manual_seed(0)
    clt.initialise(generator)
    mlp_in, mlp_out = (torch.randn(2, 6, 4, generator=generator) for _ in range(2))
    return clt, Activations(mlp_in, mlp_out, torch.tensor([True, False, False] * 2))


def test_learning_rate_by_hand(small):
    trainer = make_trainer(small[0], steps=10, learning_rate=8, warmup_steps=4, decay_share=0.5)
    cosine = [4 * (1 + math.cos(math.pi * share)) for share in (0.2, 0.4, 0.6, 0.8, 1)]
    expected = [2, 4, 6, 8, 8, 8, *cosine]
    assert [trainer.learning_rate(step) for step in range(11)] == pytest.approx(expected)


def test_learning_rate_without_warm_up_that_decays_all_along(small):
    trainer = make_trainer(small[0], steps=4, learning_rate=1, warmup_steps=0, decay_share=1)
    root = math.sqrt(0.5) / 2
    assert [trainer.learning_rate(step) for step in range(5)] == pytest.approx([1, 0.5 + root, 0.5, 0.5 - root, 0])


def test_step_metrics_by_definition(small):
    clt, batch = small
    error = (clt(batch.mlp_in) - batch.mlp_out).detach().double().numpy() ** 2
    weight = np.array([5, 1, 1, 5, 1, 1])
    spread = batch.mlp_out.double().numpy().var(axis=1).mean(-1)
    metrics = make_trainer(clt, cls_weight=5).train_step(batch)
    assert metrics.loss == pytest.approx((error.mean((0, 2)) * weight).sum() / weight.sum(), rel=1e-5)
    assert metrics.r2 == pytest.approx(1 - (error.mean((1, 2)) / spread).mean(), rel=1e-5)
    assert metrics.l0 == pytest.approx((clt.encode(batch.mlp_in).values > 0).sum(-1).double().mean().item(), abs=1)


def test_first_step_of_adam_moves_weights_by_the_warmed_up_rate(small):
    clt, batch = small
    before = clt.b_dec.detach().clone()
    make_trainer(clt, learning_rate=0.04, warmup_steps=4).train_step(batch)
    torch.testing.assert_close((clt.b_dec - before).abs(), torch.full((2, 4), 0.01), rtol=1e-3, atol=0)


def test_gradient_is_clipped(small):
    clt, batch = small
    make_trainer(clt, gradient_clip=0.01).train_step(batch)
    norm = torch.cat([parameter.grad.flatten() for parameter in clt.parameters()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_training_works_on_normalised_activations(small):
    """The same loss, however inputs and outputs are shifted and scaled, once that is known."""
    clt, batch = small
    expected = make_trainer(clt).train_step(batch).loss
    clt.initialise(torch.Generator().manual_seed(0))
    trainer = make_trainer(clt)
    trainer.normalisation = Normalisation(
        in_mean=torch.full((2, 4), 3.0),
        in_scale=torch.tensor([2.0, 5.0]),
        out_mean=torch.full((2, 4), -7.0),
        out_scale=torch.tensor([0.5, 4.0]),
        out_mean_cls=torch.zeros(2, 4),
    )
    scaled = batch._replace(
        mlp_in=batch.mlp_in * torch.tensor([2.0, 5.0])[:, None, None] + 3,
        mlp_out=batch.mlp_out * torch.tensor([0.5, 4.0])[:, None, None] - 7,
    )
    assert trainer.train_step(scaled).loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_is_noticed_before_any_weight_is_spoilt(small, value):
    clt, batch = small
    before = {name: tensor.clone() for name, tensor in clt.state_dict().items()}
    trainer = make_trainer(clt)
    with pytest.raises(TrainingDiverged, match=f"loss is {value} at step 0"):
        trainer.train_step(batch._replace(mlp_out=torch.full_like(batch.mlp_out, value)))
    assert trainer.step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in clt.state_dict().items())
