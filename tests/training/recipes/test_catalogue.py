"""`vitrine recipes`: every shipped recipe in one list, one in detail, and both as JSON."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from common import ROOT
from vitrine.commands import app
from vitrine.training.recipes.catalogue import shipped
from vitrine.training.recipes.costs import GPUS, estimate
from vitrine.training.recipes.reading import load_recipe

NAMES = [path.stem for path in shipped()]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*arguments, width=200, code=0) -> what `vitrine recipes` prints, with an empty data root."""

    def invoke(*arguments, width=200, code=0):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("VITRINE_DATA", str(tmp_path))
        result = CliRunner().invoke(app, ["recipes", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.stderr

    return invoke


@pytest.mark.parametrize("width", [80, 200])
def test_the_list_has_every_recipe_on_one_whole_line(run, width):
    lines = run(width=width).splitlines()
    assert max(len(line) for line in lines if not line.startswith("?")) <= width  # those name files, whole
    rows = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in NAMES}
    assert list(rows) == NAMES
    assert {"6,144", "64", "425"} <= set(rows["b16-coco-relu_topk"].split())
    assert ("ViT-B-16 COCO" in rows["b16-coco-relu_topk"]) is (width == 200)


def test_the_lists_numbers_are_the_estimates(run, tmp_path):
    costs = estimate(load_recipe(shipped()[0]), tmp_path)
    row = next(line for line in run().splitlines() if line.strip().startswith(NAMES[0])).split()
    assert float(row[-len(GPUS) - 2]) == pytest.approx(costs.total_memory / 2**30, abs=0.05)
    assert float(row[-len(GPUS) - 1]) == pytest.approx(costs.flops / 1e15, abs=0.5)
    assert [float(hours) for hours in row[-len(GPUS) :]] == pytest.approx(
        [costs.hours(gpu, 0.4) for gpu in GPUS], rel=0.05
    )


def test_a_share_of_the_peak_can_be_chosen(run):
    whole, half = (json.loads(run("quick", "--json", "--share", share))["costs"]["hours"] for share in ("1", "0.5"))
    assert half == {gpu: pytest.approx(2 * hours) for gpu, hours in whole.items()}
    assert "Hours: at 50%" in run("--share", "0.5")


def test_one_recipe_in_detail(run):
    output = run("b32-coco-jumprelu")
    path = next(path for path in shipped() if path.stem == "b32-coco-jumprelu")
    assert str(path) in output
    for phrase in ("12 layers of width 768, 50 tokens per image", "118,287 images", "Adam's moments", "mixing buffer"):
        assert phrase in output
    for gpu in GPUS:
        assert gpu.name in output


def test_what_does_not_fit_is_reported(run, tmp_path):
    path = tmp_path / "huge.toml"
    text = next(path for path in shipped() if path.stem == "b32-coco-jumprelu").read_text()
    path.write_text(text.replace("features = 6144", "features = 24576"))
    output = run(path)
    assert "24 GiB: does not fit" in output
    assert "141 GiB: does not fit" not in output


def test_your_own_recipe_by_its_path(run, recipe_path, data_root):
    output = run(recipe_path, "--data-root", data_root)
    assert "3 layers of width 32, 17 tokens per image" in output
    assert "4 epochs of 48 images" in output


def test_what_is_unknown_is_reported(run, recipe_path, data_root, tmp_path):
    assert "costs unknown: " in run(recipe_path)
    assert "clip/tiny.json does not exist" in run(recipe_path)
    path = tmp_path / "shards.toml"
    text = recipe_path.read_text().replace('kind = "folder", path = "train"', 'kind = "webdataset", shards = "a.tar"')
    path.write_text(text)
    assert "hours: unknown" in run(path, "--data-root", data_root)


def test_json_has_every_recipe_and_its_numbers(run, tmp_path):
    rows = json.loads(run("--json"))
    assert [row["name"] for row in rows] == NAMES
    for row, path in zip(rows, shipped(), strict=True):
        assert row["path"] == str(path)
        if row["costs"]:
            costs = estimate(load_recipe(path), tmp_path)
            assert row["costs"]["parameters"] == costs.architecture.parameters
            assert row["costs"]["memory_bytes"]["total"] == costs.total_memory
            assert row["costs"]["flops"] == costs.flops
        else:
            assert "does not exist" in row["unknown"]


def test_an_unknown_name_is_refused_with_the_nearest(run):
    assert run("b32-coco-jumprelo", code=1) == (
        "error: recipe b32-coco-jumprelo: there is no such file, and no recipe of this name comes with Vitrine; "
        "did you mean b32-coco-jumprelu?\n"
    )


def test_help_has_an_example(run):
    assert "Example: vitrine recipes b32-cifar100-relu_topk" in run("--help")


def test_it_runs_as_a_process():
    root = ROOT
    command = [sys.executable, "-m", "vitrine", "recipes"]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "\x1b" not in finished.stdout


def test_the_list_shows_no_hours_where_the_memory_does_not_suffice(run, tmp_path, monkeypatch):
    path = tmp_path / "huge.toml"
    text = next(path for path in shipped() if path.stem == "b32-coco-jumprelu").read_text()
    path.write_text(text.replace("features = 6144", "features = 24576").replace("b32-coco-jumprelu", "huge"))
    monkeypatch.setattr("vitrine.training.recipes.catalogue.SHIPPED", tmp_path)
    row = next(line for line in run().splitlines() if line.strip().startswith("huge")).split()
    fits = {gpu.name: estimate(load_recipe(path), tmp_path).fits(gpu) for gpu in GPUS}
    assert fits == {"H200": True, "H100": True, "A100": True, "L4": False, "RTX 4090": False}
    assert [number == "–" for number in row[-len(GPUS) :]] == [False, False, False, True, True]
