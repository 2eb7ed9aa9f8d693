"""Residual SAEs beside a CLT: the same images for both, the command's page, circuits that are the graphs' own."""

import json

import pytest
import torch
from typer.testing import CliRunner

from vitrine.commands import app
from vitrine.models.account.circuit import Limits, expand
from vitrine.training.checkpoint import CheckpointMeta, save_checkpoint
from vitrine.training.evaluation.beside import _inserted
from vitrine.training.evaluation.circuits import CltCircuits, SaeCircuits, circuit_figures
from vitrine.training.evaluation.sae_results import SaeResults
from vitrine.training.recipes.recipe import ResidualSaeRecipe, ResidualSaeSection


@pytest.mark.parametrize("kind", ["clt", "saes"])
def test_circuits_add_up(clip, clt, make_saes, make_pixels, kind):
    of = CltCircuits(clip, clt) if kind == "clt" else SaeCircuits(clip, make_saes(clip))
    direction = torch.nn.functional.normalize(
        torch.randn(clip.tower.embedding, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    pixels = make_pixels(1, seed=3)
    trace, target = of.target(pixels, direction)
    embedding = torch.nn.functional.normalize(clip.tower.head(clip.tower(pixels).residual_out[:, 0]), dim=-1)
    assert target.logit == pytest.approx(float(clip.logit_scale * embedding[0] @ direction), rel=1e-4, abs=1e-4)
    followed = []

    def follow(wanted):
        found = of.follow(trace, wanted)
        followed.extend(zip(wanted.activations, found, strict=True))
        return found

    graph = expand(trace, target, follow, Limits(20, 60))
    for activation, account in [(target.logit, target), *followed]:
        assert account.logit == pytest.approx(activation)
        assert abs(account.remainder) < 1e-3 * max(1, abs(account.logit))
    figures = circuit_figures(of, [(pixels, direction)], Limits(20, 60))
    assert figures.followed == len(graph.expanded) == len(followed)
    assert figures.left_out == pytest.approx(graph.leaves.left_out)
    assert figures.nodes > 0


@pytest.fixture(scope="module")
def compared(recipe, clip, checkpoint, data_root, make_saes, tmp_path_factory):
    """(folder, output) of `vitrine evaluate --beside`."""
    section = ResidualSaeSection(features=(48, 64), k=(8, 9), k_cls=(8, 9))
    of_saes = ResidualSaeRecipe(
        name="tiny-sae", kind="residual_sae", clip=recipe.clip, data=recipe.data, residual_sae=section
    )
    meta = CheckpointMeta(
        step=3, steps=3, recipe=of_saes, clip_sha256=clip.sha256, layers=3, width=32, labels=recipe.data.labels
    )
    out = tmp_path_factory.mktemp("beside")
    saes = save_checkpoint(out / "run", meta, make_saes(clip), {}, {"step": torch.zeros(1)})
    arguments = ["evaluate", "--checkpoint", saes, "--beside", checkpoint, "--data-root", data_root, "--out", out]
    options = ["--curves", "3", "--medians", "20", "--workers", "0", "--device", "cpu"]
    done = CliRunner().invoke(app, [*map(str, arguments), *options])
    assert done.exit_code == 0, done.output
    return out, done.output


def test_both_are_measured_on_the_same_images(compared):
    results = SaeResults.model_validate(json.loads((compared[0] / "results.json").read_text()))
    beside = results.beside
    assert beside.nodes.images == results.nodes.images
    assert beside.nodes.above_mean == pytest.approx(results.nodes.above_mean)
    assert (beside.saes.replaced, beside.saes.r2) == (
        results.cascade(0, 1, "all"),
        results.reconstruction["all"].r2.value,
    )
    assert (beside.clt.replaced.first, beside.clt.replaced.last) == (0, 2)
    assert beside.saes.circuits.images == beside.clt.circuits.images
    curve = results.nodes.curve("relevance")
    inserted = _inserted(results.nodes, "relevance")
    levels = [point.above_mean.value for point in curve.insertion]
    goal = levels[0] + 0.8 * (1 - levels[0])
    counts = [fraction * curve.active for fraction in results.nodes.fractions]
    at = next(level for level, value in enumerate(levels) if value >= goal - 1e-6)
    assert counts[at - 1] <= inserted <= counts[at] + 1e-6


def test_the_page_has_both(compared):
    page = (compared[0] / "report.html").read_text()
    for phrase in ('id="beside"', "residual SAEs, tiny-sae", "circuit: seconds on this CPU", "insertion area"):
        assert phrase in page
    assert "nodes that regain 80 %" in compared[1]


def test_a_clt_is_no_place_for_beside(checkpoint, data_root):
    arguments = ["evaluate", "--checkpoint", checkpoint, "--beside", checkpoint, "--data-root", data_root]
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 2
    assert "must be a run of residual SAEs" in done.stderr
