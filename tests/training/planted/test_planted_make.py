"""The whole path on drawn shapes and the tiny CLIP: it learns the cue, can be taken up, and proposals are scored."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from rich.console import Console
from typer.testing import CliRunner

from common import ROOT
from vitrine.commands import app
from vitrine.models.dictionary.average import mean_stream
from vitrine.training.checkpoint import CheckpointError
from vitrine.training.data.held_out import held_out
from vitrine.training.planted.make import load_planted, make, measure_twin, read_record
from vitrine.training.planted.recipe import PlantedRecipe
from vitrine.training.planted.score import Benchmark, ProposalError, paired, read_proposal
from vitrine.training.recipes.reading import read_toml

QUIET = Console(quiet=True)
SOURCE = {"kind": "folder", "path": "train"}
RECIPE = {
    "name": "tiny-planted",
    "clip": {"config": "clip/tiny.json", "weights": "clip/tiny.safetensors"},
    "templates": ["a photo of a {}"],
    "data": {
        "train": SOURCE,
        "test": SOURCE,
        "train_images": 16,
        "group_images": 4,
        "colour": "white",
        "correlation": 1,
    },
    "fine_tuning": {"blocks": 2, "epochs": 8, "images_per_step": 8, "learning_rate": 3e-3},
    "clt": {"features": 64, "k": 8},
    "training": {"images_per_step": 8, "mixed_images": 16, "normalisation_images": 16, "workers": 0},
    "residual": {
        "sae": {"features": 32, "k": 8},
        "training": {"images_per_step": 8, "mixed_images": 16, "normalisation_images": 16, "workers": 0},
    },
}


@pytest.fixture(scope="module")
def recipe():
    return PlantedRecipe.model_validate(RECIPE)


@pytest.fixture(scope="module")
def made(recipe, clip, data_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("planted") / "out"
    make(recipe, clip, data_root, out, QUIET)
    measure_twin(recipe, clip, out, QUIET)
    return out


@pytest.fixture(scope="module")
def benchmark(made):
    return Benchmark(made)


def test_the_cue_is_learned_and_the_twin_learns_it_not(made):
    record = read_record(made)
    assert set(record.accuracy) == {"own", "planted", "twin"}
    first, second = record.classes
    planted = {(group.label, group.group): group.accuracy.value for group in record.accuracy["planted"].groups}
    assert planted[first, "white frame"] - planted[first, "plain"] > 0.5
    assert planted[second, "plain"] - planted[second, "white frame"] > 0.5
    assert record.accuracy["twin"].worst.value > record.accuracy["planted"].worst.value


def test_only_the_upper_blocks_and_the_head_are_trained(made, clip):
    was, now = clip.model.state_dict(), load_planted(made).model.state_dict()
    changed = {key for key in was if not torch.equal(was[key], now[key])}
    assert {key.split(".")[3] for key in changed if "resblocks" in key} == {"1", "2"}
    assert changed >= {"visual.proj", "visual.ln_post.weight"}
    assert all(key.startswith("visual.") for key in changed)


def test_what_is_there_is_kept(made, recipe, clip, data_root, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    files = {path: path.read_bytes() for path in copy.rglob("*.safetensors")}
    make(recipe, clip, data_root, copy, QUIET)
    assert {path: path.read_bytes() for path in copy.rglob("*.safetensors")} == files
    other = recipe.model_copy(update={"name": "other"})
    with pytest.raises(CheckpointError, match="was made with another recipe"):
        make(other, clip, data_root, copy, QUIET)


def test_a_proposal_is_scored(benchmark, made):
    truths = {name: benchmark.truth(name) for name in ("clt", "residual")}
    assert all(truth.shift > 0 and truth.carriers[0].effect > 0 for truth in truths.values())
    aimed = [
        {"op": "ablate", "layer": carrier.layer, "index": carrier.index, "dictionary": "residual"}
        for carrier in truths["residual"].carriers
    ]
    spare = next(i for i in range(64) if all((c.layer, c.index) != (0, i) for c in truths["clt"].carriers))
    file = made.parent / "edit.json"
    file.write_text(json.dumps({"interventions": aimed}))
    score = benchmark.score(read_proposal(file))
    assert (score.interventions, score.first_rank, score.found) == (20, 1, 10)
    assert score.expected == pytest.approx(10 * 20 / truths["residual"].features)
    assert score.before == benchmark.record.accuracy["planted"]
    assert score.change.worst.value == pytest.approx(score.after.worst.value - score.before.worst.value)
    gap = benchmark.record.accuracy["twin"].worst.value - score.before.worst.value
    assert score.closed == pytest.approx(score.change.worst.value / gap)

    file.write_text(json.dumps([{"op": "ablate", "layer": 0, "index": spare}]))
    nothing = benchmark.score(read_proposal(file))
    assert (nothing.first_rank, nothing.found) == (None, 0)
    ranking = [{"layer": c.layer, "index": c.index} for c in truths["clt"].carriers[:2]]
    vector = {"op": "project", "layer": 2, "vector": [1.0, -1.0] * 16, "value": 3.0, "tokens": "cls"}
    edit = {"interventions": [vector], "mode": "direct", "evidence": {"ranking": ranking}}
    file.write_text(json.dumps(edit))
    direct = read_proposal(file)
    assert [(layer, index) for _, layer, index in direct.features] == [(c["layer"], c["index"]) for c in ranking]
    assert benchmark.score(direct).first_rank == 1
    file.write_text(json.dumps(edit | {"mode": "rerun"}))
    after = [benchmark._logits(benchmark.changes(one), one.mode) for one in (direct, read_proposal(file))]
    np.testing.assert_allclose(*after, atol=1e-3)
    assert np.abs(after[0] - benchmark._plain).max() > 1e-2

    moved = float(np.quantile(np.abs(np.diff(after[0] - benchmark._plain)), 0.5))
    file.write_text(json.dumps(edit | {"condition": {"moves_logit": moved}}))
    expected = np.where(np.abs(np.diff(after[0] - benchmark._plain)) >= moved, after[0], benchmark._plain)
    assert (benchmark.predicted(read_proposal(file)) == expected.argmax(-1)).all()
    file.write_text(json.dumps(edit | {"condition": {"activation_at_least": 1.0}}))
    with pytest.raises(ProposalError, match="a condition on activations"):
        read_proposal(file)

    file.write_text('[{"op": "ablate"}]')
    with pytest.raises(ProposalError, match="not a list of interventions"):
        read_proposal(file)


def test_means_are_those_of_the_bundle(benchmark, made):
    """Of pictures with the cue and without it: those that `vitrine export` averages."""
    record = benchmark.record
    val = held_out(record.recipe.of_clt(record.labels).data, made, benchmark.clip, images=64, labels=record.labels)
    expected = mean_stream(benchmark.clip.tower, [pixels for pixels, _ in val.batches()])
    np.testing.assert_allclose(benchmark._network.mean_stream(3), expected[3].numpy(), rtol=1e-4, atol=1e-5)


def test_pairs_have_the_cue_on_the_side_that_says_so(benchmark, made):
    rows = benchmark.rows[:3]
    (pair,) = benchmark._pairs(rows)
    for row, drawn, plain in zip(rows, *pair, strict=True):
        assert (made / "data" / paired(row)).is_file()
        assert drawn[:, 0].std(-1).max() < 1e-5 < plain[:, 0].std(-1).max()


def test_without_fine_tuning_the_cue_is_in_the_groups_alone(recipe, clip, data_root, tmp_path):
    make(recipe.model_copy(update={"fine_tuning": None, "residual": None}), clip, data_root, tmp_path, QUIET)
    record = measure_twin(recipe.model_copy(update={"fine_tuning": None}), clip, tmp_path, QUIET)
    assert record.accuracy["own"] == record.accuracy["planted"]
    assert "twin" not in record.accuracy


def test_the_commands(made, data_root, tmp_path, monkeypatch):
    """What is made already is taken up and exported; then its truth, and a proposal's score."""
    file, asked = tmp_path / "recipe.toml", {}
    module = sys.modules["vitrine.commands.export"]  # of the package's attributes its command has that name
    monkeypatch.setattr(module, "export", lambda out, **options: asked.update(options, out=out))
    file.write_text(tomli_w.dumps(RECIPE))
    arguments = ["--recipe", str(file), "--out", str(made), "--data-root", str(data_root)]
    run = CliRunner().invoke
    result = run(app, ["planted", "make", *arguments, "--seed", "5"])
    assert result.exit_code == 1
    assert "was made with another recipe" in result.output
    result = run(app, ["planted", "make", *arguments, "--seed", "0"])
    assert result.exit_code == 0, result.output
    assert "twin: worst group" in result.output
    where = {"out": "bundle", "checkpoint": "clt", "residual": "saes", "data_root": "."}
    assert {name: asked[name] for name in where} == {name: made / part for name, part in where.items()}
    result = run(app, ["planted", "score", "--planted", str(made), "--json"])
    assert set(json.loads(result.stdout)) == {"clt", "residual"}
    proposal = tmp_path / "edit.json"
    proposal.write_text('[{"op": "ablate", "layer": 0, "index": 1}]')
    result = run(app, ["planted", "score", "--planted", str(made), "--proposal", str(proposal)])
    assert result.exit_code == 0, result.output
    assert "share of the gap" in result.output


def test_the_shipped_recipe():
    read_toml(Path(ROOT) / "training/planted/planted-demo.toml", PlantedRecipe)
