"""Two processes on the CPU do what one does; impossible settings are reported."""

import os
import subprocess
import sys

import pytest
import torch

from common import timeless
from vitrine.training.checkpoint import latest, load_tensors
from vitrine.training.run.parallel import ParallelError, make_fabric

EPOCHS = "epochs = 2\nrevive_after = 1"
CASCADE = "\n[cascade]\nsteps = 4\nimages_per_step = 8\n"


@pytest.fixture(scope="module")
def run(recipe_path, data_root, tmp_path_factory):
    """run(name, *options, recipe=...) -> (last checkpoint, log) of `vitrine train`, in separate processes."""

    def run(name, *options, more=CASCADE):
        out = tmp_path_factory.mktemp("parallel") / name
        recipe = out.with_suffix(".toml")
        recipe.write_text(recipe_path.read_text().replace("epochs = 4", EPOCHS) + more)
        arguments = ["--recipe", str(recipe), "--data-root", str(data_root), "--out", str(out), "--accelerator", "cpu"]
        finished = subprocess.run(
            [sys.executable, "-m", "vitrine", "train", *arguments, *options],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == 0, finished.stderr
        return latest(out), timeless(out / "log.jsonl")

    return run


@pytest.fixture(scope="module")
def alone(run):
    return run("alone")


@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["data-parallel", "sharded"])
def test_two_processes_do_what_one_does(run, alone, options):
    checkpoint, log = run("two", "--devices", "2", *options)
    assert any(line["dead"] for line in log)  # revived, too
    assert [line["step"] for line in log] == list(range(1, 17))
    for ours, theirs in zip(log, alone[1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for file in ("clt.safetensors", "state.safetensors"):
        ours, theirs = load_tensors(checkpoint / file), load_tensors(alone[0] / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)


def test_sharded_run_can_be_resumed_by_one_process(run, alone, recipe_path, data_root):
    checkpoint, _ = run("sharded", "--devices", "2", "--shard", "--max-steps", "7")
    assert checkpoint.name == "step-00000007"
    out = checkpoint.parent
    command = [sys.executable, "-m", "vitrine", "train", "--recipe", str(out.with_suffix(".toml")), "--out", str(out)]
    subprocess.run([*command, "--data-root", str(data_root), "--accelerator", "cpu"], check=True, capture_output=True)
    ours, theirs = (load_tensors(folder / "clt.safetensors") for folder in (latest(out), alone[0]))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)


def test_torchrun_says_how_many_processes_there_are(alone, recipe_path, data_root, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_path.read_text().replace("epochs = 4", EPOCHS) + CASCADE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    arguments = ["--recipe", str(recipe), "--data-root", str(data_root), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "vitrine", "train", *arguments, "--accelerator", "cpu", "--max-steps", "4"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    log = timeless(tmp_path / "run" / "log.jsonl")
    for ours, theirs in zip(log, alone[1][:4], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_devices_that_are_not_there_are_named():
    if not torch.cuda.is_available():
        with pytest.raises(ParallelError, match="--devices is 1, but 0 GPUs were found"):
            make_fabric(accelerator="cuda")
    with pytest.raises(ParallelError, match="not one of auto, cuda, cpu"):
        make_fabric(accelerator="tpu")
    with pytest.raises(ParallelError, match="cannot be sharded on one device"):
        make_fabric(shard=True, accelerator="cpu")
