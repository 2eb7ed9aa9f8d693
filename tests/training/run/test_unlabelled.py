"""Images without classes, and without labels: trained on, measured, exported with labels of a file, and with cards."""

import json
import shutil

import duckdb
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from common import LABELS, RECIPE
from vitrine.commands import app
from vitrine.models.graph.onnx_file import ExportError
from vitrine.training import export as export_module
from vitrine.training.cards.build import Options, build_cards
from vitrine.training.checkpoint import CheckpointError, latest, load_clt, read_meta, save_checkpoint
from vitrine.training.recipes.reading import load_recipe
from vitrine.training.recipes.recipe import CascadeSection, RecipeError
from vitrine.training.run.run import train

NO_LABELS = RECIPE.replace('labels = ["red circle", "green square", "blue triangle"]\n', "")


def run(*arguments, exits=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exits, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def root(data_root, clip, tmp_path_factory):
    """A data root of images in flat folders: train/00.png, val/00.png, and so on."""
    root = tmp_path_factory.mktemp("flat")
    shutil.copytree(data_root / "clip", root / "clip")
    for split in ("train", "val"):
        (root / split).mkdir()
        for number, file in enumerate(sorted((data_root / split).glob("*/*.png"))):
            shutil.copy(file, root / split / f"{number:02}.png")
    (root / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    return root


@pytest.fixture
def recipe_of(tmp_path):
    def write(text):
        (tmp_path / "recipe.toml").write_text(text)
        return load_recipe(tmp_path / "recipe.toml")

    return write


def test_a_run_on_images_alone(root, tmp_path, monkeypatch):
    (tmp_path / "recipe.toml").write_text(NO_LABELS.replace("epochs = 4", "epochs = 1"))
    data, checkpoint = ("--data-root", root), ("--checkpoint", tmp_path / "run")
    printed = run("train", "--recipe", tmp_path / "recipe.toml", "--out", tmp_path / "run", *data)
    assert "left out: there are no labels, so nothing is predicted" in printed
    meta = read_meta(latest(tmp_path / "run"))
    assert meta.labels == ()
    assert meta.metrics.r2 is not None
    assert meta.metrics.zero_shot_top1 is meta.metrics.replacement_all_top1 is None

    evaluate = ("evaluate", *checkpoint, *data, "--workers", 0)
    run(*evaluate, "--labels-file", root / "labels.txt", "--out", tmp_path / "figures")
    figures = json.loads((tmp_path / "figures/results.json").read_text())
    assert figures["labels"] == list(LABELS)
    assert all(cascade["top1"] is None and cascade["agreement"] for cascade in figures["cascades"])

    export = ("export", *checkpoint, *data, "--out", tmp_path / "bundle")
    assert "trained without labels, but a bundle needs default labels" in run(*export, exits=1)
    exported = []  # what is written is tests/models/export's concern

    def export_bundle(clip, clt, cls_mean, provenance, *others):
        exported.append(provenance)
        raise ExportError("stop here")

    monkeypatch.setattr(export_module, "export_bundle", export_bundle)
    run(*export, "--labels-file", root / "labels.txt", exits=1)
    run(*export, "--labels", "cat, dog", exits=1)
    assert [tuple(provenance.labels) for provenance in exported] == [LABELS, ("cat", "dog")]


def test_cards_of_images_alone(root, checkpoint, bundle, clip, recipe_of, tmp_path):
    meta = read_meta(checkpoint).model_copy(update={"recipe": recipe_of(NO_LABELS)})
    clt, cls_mean, _ = load_clt(checkpoint)
    flat = save_checkpoint(tmp_path / "run", meta, clt, {"out_mean_cls": cls_mean}, {"step": torch.zeros(1)})
    options = Options(vocabulary=("labels",), exemplars=4, shown=3, references=8, workers=0)
    carded = build_cards(clip, flat, bundle, root, tmp_path / "carded", options, Console(quiet=True))
    assert carded.manifest.cards.vocabulary == 3
    with duckdb.connect() as database:
        rows = database.sql(f"SELECT name, class_name FROM '{carded.path}/cards/images.parquet' ORDER BY image")
        names, classes = zip(*rows.fetchall(), strict=True)
    assert {name.split("/")[0] for name in names} == {"train"}
    assert set(classes) == {""}


def test_the_cascade_needs_labels_but_no_classes(root, clip, recipe_of, tmp_path):
    bare = recipe_of(NO_LABELS.replace("epochs = 4", "epochs = 1"))
    console = Console(quiet=True)
    cascade = {"cascade": CascadeSection(steps=1, images_per_step=4)}
    with pytest.raises(RecipeError, match=r"\[cascade\] needs labels .*: give `labels` or `labels_file` in \[data\]"):
        train(bare.model_copy(update=cascade), clip, root, tmp_path / "none", console)
    labelled = bare.model_copy(update={"data": bare.data.model_copy(update={"labels_file": "labels.txt"})} | cascade)
    meta = read_meta(train(labelled, clip, root, tmp_path / "run", console))
    assert (meta.step, meta.labels, meta.metrics.zero_shot_top1) == (7, LABELS, None)
    zero = {"cascade": CascadeSection(steps=1, images_per_step=4, prediction_weight=0)}
    assert read_meta(train(bare.model_copy(update=zero), clip, root, tmp_path / "zero", console)).step == 7


def test_a_run_is_not_taken_up_with_other_labels(root, clip, recipe_of, tmp_path):
    """The recipe stays the same, and the file that it names has changed."""
    recipe = recipe_of(NO_LABELS.replace("[data]", '[data]\nlabels_file = "some.txt"'))
    (root / "some.txt").write_text("cat\ndog\n")
    train(recipe, clip, root, tmp_path / "run", Console(quiet=True), max_steps=1)
    (root / "some.txt").write_text("dog\ncat\n")
    with pytest.raises(CheckpointError, match=r"belongs to another run \(the labels differ\): .*choose an empty --out"):
        train(recipe, clip, root, tmp_path / "run", Console(quiet=True), max_steps=1)
