"""Images without classes, and without labels: what can be measured is the same, the rest is absent and not zero."""

import json
import re
from io import StringIO

import pytest
from rich.console import Console

from vitrine.training.data.held_out import held_out
from vitrine.training.evaluation.evaluate import evaluate, evaluate_summary
from vitrine.training.evaluation.results import Results
from vitrine.training.recipes.image_sources import FolderSource
from vitrine.training.report.report import draw_thumbnails, write_report
from vitrine.training.report.sheets import print_sheets

QUIET = Console(quiet=True)
OPTIONAL = ("replacement", "faithfulness", "retrieval")  # sections of the report


@pytest.fixture(scope="module")
def images(recipe, data_root, clip):
    """The same twelve images, in the same order: with classes, without, and without labels, too."""
    flat = {"val": FolderSource(kind="folder", path="val", classes=False)}
    sections = {
        "classes": recipe.data,
        "labels": recipe.data.model_copy(update=flat),
        "nothing": recipe.data.model_copy(update=flat | {"labels": None}),
    }
    return {name: held_out(section, data_root, clip, workers=0) for name, section in sections.items()}


@pytest.fixture(scope="module")
def found(images, checkpoint, clip):
    return {name: evaluate(clip, checkpoint, one, QUIET, other=checkpoint) for name, one in images.items()}


def test_reconstruction_and_contributions_need_no_labels(found):
    for name in ("labels", "nothing"):
        assert found[name].reconstruction == found["classes"].reconstruction
        assert found[name].contributions == found["classes"].contributions
        assert found[name].comparison.reconstruction == found["classes"].comparison.reconstruction


def test_agreement_and_divergence_need_no_classes(found):
    ours, expected = found["labels"], found["classes"]
    assert len(ours.cascades) == 9
    for cascade, other in zip(ours.cascades, expected.cascades, strict=True):
        assert cascade == other.model_copy(update={"top1": None, "difference": None})
    top1 = {"keep": None, "drop": None, "keep_top4": None, "drop_top1": None}
    curves = [curve.model_copy(update=top1) for curve in expected.faithfulness.curves]
    absent = {"curves": curves, "random_keep": [], "random_drop": [], "drop_one": [], "drop_one_mean": None}
    assert ours.faithfulness == expected.faithfulness.model_copy(update=absent)
    assert (ours.baseline, ours.retrieval, ours.comparison.gains) == (None, None, [None] * 9)
    assert ours.faithfulness.harm_in_top1("cls") is None
    assert ours.faithfulness.harm_in_divergence("cls") == expected.faithfulness.harm_in_divergence("cls")


def test_without_labels_nothing_is_predicted(found):
    results = found["nothing"]
    assert (results.labels, results.baseline, results.cascades, results.faithfulness) == ([], None, [], None)
    assert (results.retrieval, results.comparison.cascades, results.comparison.gains) == (None, [], [])


@pytest.mark.parametrize(
    ("name", "said", "sections"),
    [
        ("classes", "", {"replacement", "faithfulness", "retrieval"}),
        ("labels", "has no classes, so predictions cannot be checked", {"replacement", "faithfulness"}),
        ("nothing", "there are no labels, so nothing is predicted", set()),
    ],
)
def test_tables_and_report_say_what_was_left_out(found, images, clip, tmp_path, name, said, sections):
    results = found[name]
    text = results.model_dump_json()
    assert "NaN" not in text
    assert json.loads(Results.model_validate_json(text).model_dump_json()) == json.loads(text)
    console = Console(width=200, file=StringIO())
    print_sheets(results, console)
    write_report(results, draw_thumbnails(results, images[name], clip), tmp_path / "report.html")
    page, printed = (tmp_path / "report.html").read_text(), console.file.getvalue()
    assert {part for part in OPTIONAL if f'<section id="{part}">' in page} == sections
    assert {part for part in OPTIONAL if f'href="#{part}"' in page} == sections
    assert ("left out: " in printed) == bool(said)
    assert ("change in top-1, points" in " ".join(printed.split())) == (name == "classes")
    assert ("divergence from CLIP's own distribution in nats. From all" in " ".join(printed.split())) == (
        name == "labels"
    )
    for output in (page, printed):
        assert said in output
        assert not re.search(r"\bnan\b", output)


def test_the_summarys_accuracies_are_absent(images, clip, clt, recipe):
    summary = {
        name: evaluate_summary(clip, clt, one, recipe.data.templates, QUIET).model_dump()
        for name, one in images.items()
    }
    accuracies = {name for name in summary["classes"] if name.endswith("_top1")}
    assert len(accuracies) == 5
    agreements = {name for name in summary["classes"] if name.endswith("_agreement")}  # with CLIP: no classes needed
    assert len(agreements) == 2
    assert summary["labels"] == summary["classes"] | dict.fromkeys(accuracies)
    assert summary["nothing"] == summary["classes"] | dict.fromkeys(accuracies | agreements)
