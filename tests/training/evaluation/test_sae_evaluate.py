"""`vitrine evaluate` of residual SAEs: every figure against a plain computation; the tables and the page."""

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from vitrine.commands import app
from vitrine.models.dictionary.residual_replacement import ResidualReplacement
from vitrine.models.dictionary.residual_sae import ResidualSaes, standardise
from vitrine.training.checkpoint import CheckpointMeta, save_checkpoint
from vitrine.training.data.held_out import held_out, train_images
from vitrine.training.evaluation.residual_sae import evaluate
from vitrine.training.recipes.recipe import ResidualSaeRecipe, ResidualSaeSection

QUIET = Console(quiet=True)
OF_CURVES = ("--curves", "2", "--medians", "20")


@pytest.fixture(scope="module")
def sae_checkpoint(recipe, clip, tmp_path_factory):
    """Of random SAEs; one feature of the second never fires."""
    section = ResidualSaeSection(features=(48, 64), k=(12, 16), k_cls=(9,))
    fields = {"name": "tiny-sae", "kind": "residual_sae", "clip": recipe.clip, "data": recipe.data}
    saes = ResidualSaes(section.architecture(3, 32))
    saes.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        saes.encoders[1].bias[7] = -100.0
    meta = CheckpointMeta(
        step=3,
        steps=3,
        recipe=ResidualSaeRecipe(**fields, residual_sae=section),
        clip_sha256=clip.sha256,
        layers=3,
        width=32,
        labels=recipe.data.labels,
    )
    return save_checkpoint(tmp_path_factory.mktemp("sae-run"), meta, saes, {}, {"step": torch.zeros(1)}), saes.eval()


@pytest.fixture(scope="module")
def images(recipe, clip, data_root):
    return held_out(recipe.data, data_root, clip, workers=0)


@pytest.fixture(scope="module")
def results(sae_checkpoint, clip, images, recipe, data_root):
    of_medians = train_images(recipe.data, data_root, clip, images=20, workers=0)
    return evaluate(clip, sae_checkpoint[0], images, QUIET, curves=2, of_medians=of_medians)


@pytest.fixture(scope="module")
def everything(clip, images):
    """(pixels, label indices) of all images."""
    pixels, truth = zip(*images.batches(), strict=True)
    return torch.cat(pixels), torch.cat(truth)


@torch.no_grad()
def test_reconstruction_by_hand(results, sae_checkpoint, clip, everything):
    stream = clip.tower.embed(everything[0])
    for layer, (encoder, decoder) in enumerate(
        zip(sae_checkpoint[1].encoders, sae_checkpoint[1].decoders, strict=True)
    ):
        stream = stream + clip.tower.attention(layer, stream)
        stream = stream + clip.tower.mlp(layer, stream)[1]
        x = standardise(stream)
        is_cls = torch.arange(17).repeat(len(stream)) == 0
        code = encoder(x.x.flatten(0, 1), is_cls)
        version = decoder(code).view_as(x.x)
        for own, ours, figures in (
            (x.x, version, results.reconstruction),
            (stream, x.undone(version), results.raw),
        ):
            own, ours = own.double(), ours.double()
            error, total = (own - ours).square().sum(), (own - own.mean((0, 1))).square().sum()
            assert figures["all"].layers[layer].r2 == pytest.approx(float(1 - error / total), abs=1e-5)
            cosine = torch.cosine_similarity(own, ours, dim=-1)
            assert figures["cls"].layers[layer].cosine == pytest.approx(float(cosine[:, 0].mean()), abs=1e-5)
        fired = len(code.indices[code.values != 0].unique())
        assert results.reconstruction["all"].layers[layer].dead_share == pytest.approx(1 - fired / (48, 64)[layer])
        assert results.reconstruction["cls"].layers[layer].l0 == 9
        assert results.raw["patches"].layers[layer].l0 == (12, 16)[layer]
    assert results.reconstruction["all"].layers[1].dead_share > 0


@torch.no_grad()
def test_predictions_are_those_of_the_replacement_model(results, sae_checkpoint, clip, images, everything):
    model, (pixels, truth) = ResidualReplacement(clip.tower, sae_checkpoint[1]), everything
    labels = clip.encode_labels(list(images.labels), ["a photo of a {}", "a drawing of one {}"])

    def log_probabilities(residual):
        embedding = torch.nn.functional.normalize(clip.tower.head(residual[:, 0]), dim=-1)
        return (clip.logit_scale * embedding @ labels.T).log_softmax(-1)

    own = log_probabilities(clip.tower(pixels).residual_out)
    assert results.baseline.value == pytest.approx((own.argmax(-1) == truth).double().mean().item())
    assert [(c.first, c.last, c.tokens) for c in results.singles] == [(0, 0, "all"), (1, 1, "all")]
    assert {(c.first, c.last) for c in results.cascades} >= {(0, 1)}
    for cascade in results.singles + results.cascades:
        replaced = log_probabilities(model(pixels, range(cascade.first, cascade.last + 1), cascade.tokens).residual)
        agreement = (replaced.argmax(-1) == own.argmax(-1)).double().mean().item()
        assert cascade.agreement.value == pytest.approx(agreement)
        divergence = (own.exp() * (own - replaced)).sum(-1).mean().item()
        assert cascade.divergence.value == pytest.approx(divergence, rel=1e-3, abs=1e-6)


def test_the_command_writes_results_tables_and_a_page(results, sae_checkpoint, data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["evaluate", "--checkpoint", sae_checkpoint[0], "--data-root", data_root, "--out", tmp_path]
    done = CliRunner().invoke(app, [*map(str, arguments), "--workers", "0", "--device", "cpu", *OF_CURVES])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(results.model_dump_json())
    for phrase in (
        "after block",
        "explained, [CLS]",
        "same prediction",
        "raw cosine",
        "medians over 20 train images",
        "What features respond to",
    ):
        assert phrase in done.output
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 6
    for phrase in (
        "tiny-sae",
        'id="replacement"',
        "Fraction of variance explained",
        "residual_sae",
        'id="nodes"',
        'id="levels"',
    ):
        assert phrase in page
    assert "{{" not in page


def test_commands_that_need_a_clt_say_so(sae_checkpoint, data_root, tmp_path):
    export = ["export", "--checkpoint", sae_checkpoint[0], "--out", tmp_path / "bundle", "--data-root", data_root]
    done = CliRunner().invoke(app, [*map(str, export)])
    assert done.exit_code == 1
    assert "has residual SAEs, but a Cross-Layer Transcoder is needed here" in done.stderr.replace("\n", " ")
