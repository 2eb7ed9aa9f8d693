"""Runs of residual SAEs: the trainer, checkpoints and cache are those of a CLT; what differs is tested here."""

import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from common import timeless
from vitrine.training.checkpoint import CheckpointError, latest, load_clt, load_residual_saes, load_tensors, read_meta
from vitrine.training.data.held_out import held_out
from vitrine.training.evaluation.residual_sae import evaluate_summary
from vitrine.training.recipes.reading import load_recipe
from vitrine.training.run.run import train

QUIET = Console(quiet=True)
SECTION = """[residual_sae]
features = [48, 64]
k = [6, 8]
k_cls = 4
"""


@pytest.fixture(scope="module")
def recipe_text(recipe_path):
    """The tiny recipe, of residual SAEs: two epochs of 6 steps; features are dead soon."""
    text = recipe_path.read_text().replace("[clt]\nfeatures = 64\nk = 8\n", SECTION).replace("cls_weight = 4\n", "")
    return 'kind = "residual_sae"\n' + text.replace("epochs = 4", "epochs = 2\nrevive_after = 200")


@pytest.fixture(scope="module")
def write(recipe_text, tmp_path_factory):
    """write(**replacements by key of the table) -> the recipe's file."""

    def write(*changes):
        text = recipe_text
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path_factory.mktemp("recipe") / "tiny-sae.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="module")
def start(clip, data_root):
    """start(out, recipe file, max_steps=None): `train` into `out`."""

    def start(out, path, max_steps=None):
        return train(load_recipe(path), clip, data_root, out, QUIET, max_steps=max_steps)

    return start


@pytest.fixture(scope="module")
def straight(start, write, tmp_path_factory):
    """The last checkpoint of an uninterrupted run."""
    return start(tmp_path_factory.mktemp("runs") / "straight", write())


def log(checkpoint):
    return timeless(checkpoint.parent / "log.jsonl")


def assert_same_bits(one, two):
    for name in ("residual_sae.safetensors", "state.safetensors"):
        ours, theirs = load_tensors(one / name), load_tensors(two / name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_a_run_explains_more_and_more_and_counts_only_features_that_exist(straight):
    r2 = [line["r2"] for line in log(straight)]
    assert r2[-1] > 0.65 > 0.4 > r2[0]
    dead = [line["dead"] for line in log(straight)]
    assert dead[0] == 0 < max(dead) < 48 + 64
    assert log(straight)[-1]["l0"] == pytest.approx((16 * 7 + 4) / 17, abs=0.2)  # tokens are mixed


def test_rows_of_a_checkpoint_have_length_one(straight):
    saes, meta = load_residual_saes(straight)
    assert (saes.architecture.features, saes.architecture.k, saes.architecture.k_cls) == ((48, 64), (6, 8), (4, 4))
    for decoder in saes.decoders:
        torch.testing.assert_close(decoder.weight.norm(dim=-1), torch.ones(len(decoder.weight)))
    assert (meta.step, meta.recipe.kind) == (12, "residual_sae")


def test_finished_run_is_measured_on_val(straight, clip, data_root):
    saes, meta = load_residual_saes(straight)
    images = held_out(meta.recipe.data, data_root, clip)
    assert meta.metrics == evaluate_summary(clip, saes, images, meta.recipe.data.templates, QUIET)
    assert meta.metrics.r2 > 0.6
    assert 0 <= meta.metrics.replacement_all_agreement <= 1


VARIANTS = {
    "relu_topk": (),
    "jumprelu": (("k_cls = 4", 'k_cls = 4\nsparsifier = "jumprelu"'),),
    "batch_topk": (("k_cls = 4", 'k_cls = 4\nsparsifier = "batch_topk"'),),
    "abs_topk": (("k_cls = 4", 'k_cls = 4\nsparsifier = "abs_topk"'),),
    "cache, bf16": (("[training]", '[training]\ncache = "float32"\nprecision = "bf16-mixed"'),),
    "narrowing": (("[training]", "[training]\nk_start = 2.0\nk_anneal_share = 0.8"),),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_can_be_resumed(start, write, straight, tmp_path, variant):
    path = write(*VARIANTS[variant])
    whole = straight if variant == "relu_topk" else start(tmp_path / "whole", path)
    start(tmp_path / "parts", path, max_steps=4)
    start(tmp_path / "parts", path, max_steps=5)
    parts = start(tmp_path / "parts", path)
    assert read_meta(parts).step == 12
    assert_same_bits(parts, whole)
    assert log(parts) == log(whole)


def test_checkpoints_of_the_other_kind_are_refused_by_what_they_are(straight, checkpoint):
    with pytest.raises(CheckpointError, match=f"{straight} has residual SAEs, but a Cross-Layer Transcoder is needed"):
        load_clt(straight)
    with pytest.raises(CheckpointError, match="has a Cross-Layer Transcoder, but residual SAEs are needed"):
        load_residual_saes(checkpoint)


def test_folder_of_another_run_is_refused(straight, start, write, recipe_path):
    for named, path in {
        r"residual_sae\.k is \[6, 8\] there and 5 here": write(("k = [6, 8]", "k = 5")),
        r"its recipe has \[residual_sae\], this one has \[clt\]\)": recipe_path,
    }.items():
        with pytest.raises(CheckpointError, match=rf"belongs to another run \({named}.*choose an empty --out"):
            start(straight.parent, path)


@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["data-parallel", "sharded"])
def test_two_processes_do_what_one_does(straight, write, data_root, tmp_path, options):
    out = tmp_path / "two"
    arguments = ["--recipe", write(), "--data-root", data_root, "--out", out, "--accelerator", "cpu", "--devices", 2]
    finished = subprocess.run(
        [sys.executable, "-m", "vitrine", "train", *map(str, arguments), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    for ours, theirs in zip(log(latest(out)), log(straight), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for file in ("residual_sae.safetensors", "state.safetensors"):
        ours, theirs = load_tensors(latest(out) / file), load_tensors(straight / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)
