"""The whole evaluation of the tiny CLIP on the drawn shapes: against direct computations, and as a command."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from common import ROOT
from vitrine.commands import app
from vitrine.models.account.windows import TOKENS
from vitrine.models.bootstrap import Bootstrap
from vitrine.models.bundle.manifest import Metrics
from vitrine.models.dictionary.replacement import Replacement
from vitrine.training.checkpoint import CheckpointError, CheckpointMeta, latest, save_checkpoint
from vitrine.training.data.held_out import held_out
from vitrine.training.data.images import DataError
from vitrine.training.evaluation.evaluate import cls_warning, evaluate, evaluate_summary
from vitrine.training.evaluation.measure import Plan, measure
from vitrine.training.evaluation.results import Results
from vitrine.training.evaluation.sae_results import SaeResults
from vitrine.training.report import paper
from vitrine.training.report.report import write_report
from vitrine.training.report.sheets import print_sheets, sheets

WINDOWS = [range(3), range(1, 3)]


@pytest.fixture(scope="module")
def images(recipe, data_root, clip):
    return held_out(recipe.data, data_root, clip, batch_size=5, workers=0)


@pytest.fixture(scope="module")
def label_embeddings(clip, recipe):
    return clip.encode_labels(list(recipe.data.labels), list(recipe.data.templates))


@pytest.fixture(scope="module")
def measured(clip, clt, images, label_embeddings):
    plan = Plan(WINDOWS, matrices=True, random_orders=3, retrieval=True)
    return measure(clip, clt, images, label_embeddings, plan, Bootstrap(12), Console(quiet=True))


@pytest.fixture(scope="module")
def everything(clip, images):
    """(pixels, label indices) of all twelve val images."""
    parts = list(images.batches())
    return torch.cat([pixels for pixels, _ in parts]), torch.cat([truth for _, truth in parts])


@pytest.fixture(scope="module")
def taps(clip, everything):
    return clip.tower(everything[0])


@pytest.fixture(scope="module")
def codes(clt, taps):
    return clt.encode(taps.mlp_in.flatten(1, 2), torch.arange(17).eq(0).repeat(12))


def predictions(clip, residual, label_embeddings):
    return (clip.tower.head(residual) @ label_embeddings.T).argmax(-1)


# The passes


@pytest.mark.parametrize("tokens", ["all", "cls", "patches"])
@pytest.mark.parametrize("is_centred", [False, True])
def test_contribution_scores_are_the_definition(clt, codes, measured, tokens, is_centred):
    """Token by token in float64, centred per pair of layers and token type."""
    is_cls = torch.arange(17).eq(0).repeat(12)
    chosen = {"all": is_cls | True, "cls": is_cls, "patches": ~is_cls}[tokens]
    matrix = (measured.centred if is_centred else measured.raw).matrix(tokens)
    for target, decoder in enumerate(clt.decoders):
        parts = []
        for source, weight in enumerate(decoder.weights):
            dense = torch.zeros(12 * 17, clt.features, dtype=torch.float64)
            dense.scatter_add_(1, codes[source].indices, codes[source].values.double())
            part = dense @ weight.double()
            if is_centred:
                part[is_cls] -= part[is_cls].mean(0)
                part[~is_cls] -= part[~is_cls].mean(0)
            parts.append(part)
        total = sum(parts)
        for source, part in enumerate(parts):
            values = [
                float(part[token] @ total[token] / (total[token] @ total[token])) for token in chosen.nonzero()[:, 0]
            ]
            assert matrix[target, source].item() == pytest.approx(sum(values) / len(values), abs=1e-4)
        assert matrix[target].sum().item() == pytest.approx(1, abs=1e-5)
        assert matrix[target, target + 1 :].tolist() == [0] * (2 - target)


@pytest.mark.parametrize("tokens", ["all", "cls", "patches"])
def test_r2_is_about_the_means_of_these_images(clt, taps, codes, measured, tokens):
    chosen = {"all": slice(None), "cls": slice(1), "patches": slice(1, None)}[tokens]
    truth = taps.mlp_out[:, :, chosen].double().flatten(1, 2)
    decoded = clt.decode(codes).view_as(taps.mlp_out)[:, :, chosen].double().flatten(1, 2)
    error = (truth - decoded).square().sum((1, 2))
    expected = 1 - error / (truth - truth.mean(1, keepdim=True)).square().sum((1, 2))
    figures = measured.reconstruction.figures()[tokens]
    assert [layer.r2 for layer in figures.layers] == pytest.approx(expected.tolist(), rel=1e-6)


def test_centred_and_raw_scores_differ(measured):
    assert (measured.raw.matrix("cls") - measured.centred.matrix("cls")).abs().max() > 0.05


@pytest.mark.parametrize("pair", range(6))
def test_cascades_are_the_replacement_models(clip, clt, everything, label_embeddings, measured, pair):
    pixels, truth = everything
    window, tokens = measured.cascades.pairs[pair]
    residual = Replacement(clip.tower, clt)(pixels, window, tokens).residual[:, 0]
    right = predictions(clip, residual, label_embeddings) == truth
    assert measured.cascades.right[:, pair].tolist() == right.double().tolist()


def test_the_baseline_is_clip(clip, everything, label_embeddings, measured):
    pixels, truth = everything
    embedding = clip.model.encode_image(pixels)
    assert measured.cascades.clip_right.tolist() == ((embedding @ label_embeddings.T).argmax(-1) == truth).tolist()


def test_keeping_every_source_is_replacing_the_last_layer(clip, clt, everything, label_embeddings, measured):
    pixels, truth = everything
    residual = Replacement(clip.tower, clt)(pixels, range(2, 3), "cls").residual[:, 0]
    right = (predictions(clip, residual, label_embeddings) == truth).double()
    for name in ("keep", "image_keep"):
        assert measured.interventions.right(name)[..., -1].view(12, -1)[:, 0].tolist() == right.tolist()
    for name in ("drop", "image_drop"):
        assert measured.interventions.right(name)[..., 0].view(12, -1)[:, -1].tolist() == right.tolist()


def test_interventions_are_the_definition(clip, clt, taps, codes, everything, label_embeddings, measured):
    """Keep-k by the ranking at [CLS], with explicit sums; the divergence shows differences that top-1 may not."""
    order = measured.raw.matrix("cls")[2].argsort(descending=True).tolist()
    assert measured.interventions.rankings["cls"].tolist() == order
    decoder, at_cls = clt.decoders[2], slice(0, None, 17)
    before = taps.residual_out[:, 0] - taps.mlp_out[2, :, 0]

    def log_probabilities(residual):
        embedding = torch.nn.functional.normalize(clip.tower.head(residual), dim=-1)
        return (clip.logit_scale * embedding @ label_embeddings.T).log_softmax(-1).double()

    own = log_probabilities(taps.residual_out[:, 0])
    for k in range(4):
        residual = before + decoder.bias
        for source in order[:k]:
            code = codes[source]
            for image in range(12):
                for feature, value in zip(code.indices[at_cls][image], code.values[at_cls][image], strict=True):
                    residual[image] += value * decoder.weights[source][feature]
        replaced = log_probabilities(residual)
        expected = (own.exp() * (own - replaced)).sum(-1)
        torch.testing.assert_close(measured.interventions.diverges("keep")[:, 0, k], expected, rtol=1e-3, atol=1e-5)


def test_a_per_layer_clt_contributes_from_its_own_layer_alone(clip, make_clt, images, label_embeddings):
    clt = make_clt(clip, cross_layer=False)
    measurement = measure(
        clip, clt, images, label_embeddings, Plan(WINDOWS, matrices=True), Bootstrap(12), Console(quiet=True)
    )
    torch.testing.assert_close(measurement.raw.matrix("all"), torch.eye(3, dtype=torch.float64))
    figures = measurement.interventions.figures(Bootstrap(12), measurement.cascades.clip_right)
    assert figures.curve("cls").order[0] == 2
    assert len({point.value for point in figures.curve("cls").keep[1:]}) == 1


def test_the_batch_size_does_not_matter(clip, clt, recipe, data_root, label_embeddings, measured):
    images = held_out(recipe.data, data_root, clip, batch_size=12, workers=0)
    measurement = measure(
        clip, clt, images, label_embeddings, Plan(WINDOWS, matrices=True), Bootstrap(12), Console(quiet=True)
    )
    torch.testing.assert_close(
        measurement.centred.matrix("patches"), measured.centred.matrix("patches"), rtol=1e-4, atol=1e-5
    )
    ours, theirs = (m.reconstruction.figures()["all"].r2.value for m in (measurement, measured))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_summary_is_the_same_figures(clip, clt, images, recipe, measured):
    summary = evaluate_summary(clip, clt, images, recipe.data.templates, Console(quiet=True))
    bootstrap = Bootstrap(12)
    baseline, cascades = measured.cascades.figures(bootstrap)
    reconstruction = measured.reconstruction.figures()
    curve = measured.interventions.figures(bootstrap, measured.cascades.clip_right).curve("cls")
    assert summary.r2 == pytest.approx(reconstruction["all"].r2.value)
    assert summary.r2_cls == pytest.approx(reconstruction["cls"].r2.value)
    assert summary.cosine == pytest.approx(reconstruction["all"].cosine)
    assert summary.dead_share == reconstruction["all"].dead_share
    assert summary.r2_kept == pytest.approx(reconstruction["all"].r2_kept)
    assert summary.r2_worst == pytest.approx(min(layer.r2 for layer in reconstruction["all"].layers))
    assert summary.relative_error_cls == pytest.approx(reconstruction["cls"].relative_error)
    for tokens, of_kind in summary.layers.items():
        assert of_kind.r2_kept == pytest.approx([layer.r2_kept for layer in reconstruction[tokens].layers])
    assert (summary.replacement_all_agreement, summary.replacement_cls_agreement) == (
        cascades[0].agreement.value,
        cascades[1].agreement.value,
    )
    assert summary.zero_shot_top1 == baseline.value
    assert (summary.replacement_all_top1, summary.replacement_cls_top1) == (
        cascades[0].top1.value,
        cascades[1].top1.value,
    )
    assert (summary.keep_top4_top1, summary.drop_top1_top1) == (curve.keep[3].value, curve.drop[1].value)


def test_codes_that_are_not_kept_are_computed_again(clip, clt, images, label_embeddings, measured, monkeypatch):
    """There is room for those of the first of three batches."""
    monkeypatch.setattr(
        "vitrine.training.evaluation.measure.KEPT_BYTES", 8 * 3 * 5 * 17 * clt.encoders[0].sparsifier.places
    )
    measurement = measure(
        clip, clt, images, label_embeddings, Plan(WINDOWS, matrices=True), Bootstrap(12), Console(quiet=True)
    )
    for tokens in TOKENS:
        torch.testing.assert_close(measurement.centred.matrix(tokens), measured.centred.matrix(tokens))


def test_a_sample_is_surveyed_and_r2_is_of_all(clip, clt, images, label_embeddings, measured, monkeypatch):
    monkeypatch.setattr("vitrine.training.evaluation.measure.SAMPLE", 4)
    measurement = measure(clip, clt, images, label_embeddings, Plan(WINDOWS), Bootstrap(12), Console(quiet=True))
    for tokens, figures in measurement.reconstruction.figures().items():
        expected = measured.reconstruction.figures()[tokens].r2
        actual = (figures.r2.value, figures.r2.low, figures.r2.high)
        assert actual == pytest.approx((expected.value, expected.low, expected.high), rel=1e-5)


# Which images


def test_a_sample_is_a_function_of_its_seed(recipe, data_root, clip):
    def sample(seed):
        return held_out(recipe.data, data_root, clip, images=5, seed=seed).indices

    assert sample(0) == sample(0) != sample(1)
    assert len(set(sample(0))) == 5
    assert held_out(recipe.data, data_root, clip, images=99).indices == tuple(range(12))


def test_labels_default_to_the_datas_own(recipe, data_root, clip, images):
    unlabelled = recipe.data.model_copy(update={"labels": None})
    assert held_out(unlabelled, data_root, clip).labels == ("blue triangle", "green square", "red circle")
    _, truth = next(images.batches())
    assert truth.tolist() == [2, 2, 2, 2, 1]  # folders by name, labels as in the recipe


def test_classes_that_are_no_labels_are_refused(recipe, data_root, clip):
    with pytest.raises(DataError, match="not among the labels: red circle"):
        held_out(recipe.data.model_copy(update={"labels": ("green square", "blue triangle")}), data_root, clip)


# The command


@pytest.fixture(scope="module")
def runs(recipe, clip, make_clt, cls_mean, tmp_path_factory):
    """The folders of a run and of a per-layer run."""
    folders = []
    for cross_layer in (True, False):
        variant = recipe.model_copy(update={"clt": recipe.clt.model_copy(update={"cross_layer": cross_layer})})
        variant = variant.model_copy(update={"name": "tiny" if cross_layer else "tiny per-layer"})
        meta = CheckpointMeta(step=24, steps=24, recipe=variant, clip_sha256=clip.sha256, layers=3, width=32)
        clt = make_clt(clip, cross_layer=cross_layer)
        out = tmp_path_factory.mktemp("runs")
        save_checkpoint(out, meta, clt, {"out_mean_cls": cls_mean}, {"step": torch.zeros(1)})
        folders.append(out)
    return folders


def run(*arguments):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def evaluated(runs, data_root, tmp_path_factory):
    """(folder with results.json and report.html, what the command printed)."""
    out = tmp_path_factory.mktemp("evaluation") / "new"
    options = ["--out", out, "--baseline", runs[1], "--workers", "0", "--device", "cpu"]
    result = run("--checkpoint", runs[0], "--data-root", data_root, *options)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_results_json_survives_a_round_trip(evaluated):
    text = (evaluated[0] / "results.json").read_text()
    results = Results.model_validate_json(text)
    assert json.loads(results.model_dump_json()) == json.loads(text)
    assert (results.images, results.layers, results.format) == (12, 3, 1)
    assert len(results.cascades) == 9
    assert results.cascade(0, 2, "all").first == 0
    assert results.comparison.cross_layer is False


def test_the_keys_of_results_json_are_in_the_readme(evaluated):
    text = (ROOT / "training" / "README.md").read_text()
    rows = re.findall(r"^\| (`[^|]*) \| (both|CLT|SAEs) \|", text, flags=re.MULTILINE)
    listed = {
        of: [key for keys, whose in rows if whose == of for key in re.findall(r"`(\w+)`", keys)] for _, of in rows
    }
    written = json.loads((evaluated[0] / "results.json").read_text())
    assert sorted(listed["both"] + listed["CLT"]) == sorted(written)
    assert sorted(listed["both"] + listed["SAEs"]) == sorted(SaeResults.model_fields)


def test_figures_stand_beside_the_report(evaluated):
    names = {path.name for path in (evaluated[0] / "figures").iterdir()}
    assert names > {"reconstruction.svg", "sparsity.svg", "contributions.svg", "cascades.svg"}


def test_curves_are_of_images_that_are_classified_rightly(evaluated):
    results = Results.model_validate_json((evaluated[0] / "results.json").read_text())
    assert results.nodes.images == round(12 * results.baseline.value)
    for curve in results.nodes.curves:
        assert curve.deletion[0].stays == curve.insertion[-1].stays == 1
        assert curve.deletion_area.low <= curve.deletion_area.value <= curve.deletion_area.high


def test_gains_are_paired(evaluated):
    results = Results.model_validate_json((evaluated[0] / "results.json").read_text())
    for ours, theirs, gain in zip(results.cascades, results.comparison.cascades, results.comparison.gains, strict=True):
        assert gain.value == pytest.approx(ours.top1.value - theirs.top1.value)
        assert gain.low <= gain.value <= gain.high


def test_the_command_prints_every_table(evaluated, runs):
    for words in (
        "Reconstruction",
        "Without outlier tokens",
        "worst",
        "Cascaded replacement",
        "Contribution scores C(i→2)",
        "From all source layers",
        "Retrieval",
        runs[1].name,
    ):
        assert words in evaluated[1]
    assert "results.json" in evaluated[1].replace("\n", "")


def test_a_checkpoint_of_another_clip_is_refused(runs, make_clip, images):
    with pytest.raises(CheckpointError, match="whose weights differ"):
        evaluate(make_clip(quick_gelu=True), latest(runs[0]), images, Console(quiet=True))


def test_a_folder_without_checkpoint_is_named(data_root, tmp_path):
    result = run("--checkpoint", tmp_path, "--data-root", data_root)
    assert result.exit_code == 1
    assert "no checkpoint" in result.stderr


# The report


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects elements, texts and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(evaluated):
    return Page((evaluated[0] / "report.html").read_text())


def test_the_report_needs_neither_network_nor_script(page):
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/jpeg;base64,"))
        assert not [name for name in attributes if name.startswith("on")]
    assert not {"script", "link", "iframe"} & {name for name, _ in page.elements}
    assert "@import" not in "".join(page.words)
    assert "url(http" not in "".join(page.words)


def test_the_report_can_be_read_aloud(page):
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert all(image["alt"] for image in page.all("img"))
    assert all(figure.get("role") == "img" and figure["aria-label"] for figure in page.all("svg"))
    assert len(page.all("svg")) == len(page.all("figcaption")) == 8
    assert all(cell["scope"] in {"row", "col"} for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_ids_are_unique_and_links_lead_somewhere(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes.get("href") or attributes.get("xlink:href") for _, attributes in page.elements]
    assert {link[1:] for link in links if link} <= set(ids)


def test_figures_take_the_pages_colours(page):
    styles = " ".join(attributes.get("style", "") for _, attributes in page.elements)
    assert "currentColor" in styles
    assert "#010203" not in styles
    assert "#000000" not in styles
    assert "font-family" not in styles


def test_a_malicious_label_stays_text(evaluated, tmp_path):
    results = Results.model_validate_json((evaluated[0] / "results.json").read_text())
    bad = '<script>alert("x")</script>'
    examples = [
        example.model_copy(update={"label": bad, "labels": [[bad] * len(row) for row in example.labels]})
        for example in results.retrieval.examples
    ]
    comparison = results.comparison.model_copy(update={"name": f"$x$ {bad} & co"})
    changed = results.model_copy(
        update={
            "labels": [bad],
            "retrieval": results.retrieval.model_copy(update={"examples": examples}),
            "comparison": comparison,
            "recipe": results.recipe.model_copy(update={"name": bad}),
        }
    )
    images = dict.fromkeys(range(12), '"><script>')
    write_report(changed, images, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert not page.all("script")
    assert page.all("img")[0]["src"] == '"><script>'
    assert bad in "".join(page.words)


def test_a_report_without_comparison_and_retrieval(evaluated, tmp_path):
    results = Results.model_validate_json((evaluated[0] / "results.json").read_text())
    bare = results.model_copy(update={"comparison": None, "retrieval": None, "nodes": None})
    write_report(bare, {}, tmp_path / "report.html")
    assert len(Page((tmp_path / "report.html").read_text()).all("svg")) == 6
    print_sheets(bare, Console(quiet=True))
    assert "retrieval" not in sheets(bare)


def test_the_papers_figures_stand_beside_the_same_windows():
    assert paper.cascade_change(12, 0, "all") == pytest.approx((-11.62, -3.1))
    assert paper.cascade_change(12, 10, "cls") == (-0.5, 0.5)
    assert paper.cascade_change(12, 5, "all") is None
    assert paper.cascade_change(24, 0, "all") is None
    assert paper.intervention_change("cls", "keep_top4") == pytest.approx((-0.93, 0.06))
    assert paper.intervention_change("image", "keep_top4") is None
    for scores in paper.ONTO_LAST.values():
        assert sum(scores) == pytest.approx(1, abs=0.003)


def test_a_clt_that_explains_cls_worse_than_half_is_warned_of(recipe):
    assert cls_warning(Metrics(r2_cls=0.5, r2_cls_worst=-3), recipe) is None
    assert cls_warning(Metrics(), recipe) is None, "unfinished"
    assert cls_warning(Metrics(r2_cls=-0.65, r2_cls_worst=-9), recipe).startswith(
        "R² at [CLS], the token that answers explain, is -0.65 (worst layer -9.00); below 0.5 an account consists "
        "mostly of"
    )
