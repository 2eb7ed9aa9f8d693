"""All of it, on a network whose cue is known: the cue's feature is first, and the edit takes it out."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from toy import Encoder, Engine, Runner, picture

from vitrine.service.offline.debias.errors import DebiasError
from vitrine.service.offline.debias.examples import of_table
from vitrine.service.offline.debias.pictures import Pictures
from vitrine.service.offline.debias.printing import print_report
from vitrine.service.offline.debias.question import Question
from vitrine.service.offline.debias.run import Debias
from vitrine.service.offline.debias.table import Row
from vitrine.service.operations.settings import Settings

IMAGES = 64


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """(folder, rows): labels a and b that the middle tells, most of a with a green border, and of b some."""
    folder, generator, rows = tmp_path_factory.mktemp("toy"), np.random.default_rng(0), []
    for number in range(IMAGES):
        label, has_cue = "ab"[number % 2], bool(number % 4 < 2) != bool(number % 8 == 3)
        red = 150 if label == "a" else 105
        colours = red + generator.integers(-8, 9), 200 * has_cue, generator.integers(0, 200)
        picture(*map(int, colours)).save(folder / f"{number:02}.png")
        rows.append(Row(f"{number:02}.png", label, "green" if has_cue else "plain", None))
    return folder, rows


def ask(folder, rows, settings=None, *, by="table", **question):
    question = Question(templates=("{}",), by=by, draws=2, **question)
    with Pictures(folder, Engine().bundle.manifest.preprocessing, Settings()) as pictures:
        examples = of_table(rows, None, 0, None)
        return Debias(Engine(), Encoder(), Runner(), pictures, question, lambda items, _: items)(examples)


@pytest.fixture(scope="module")
def report(table):
    return ask(*table, cue=("green border",))


def test_the_cues_feature_is_first(report):
    first = report.ranking[0]
    assert (first.layer, first.index, first.pair) == (0, 0, ("a", "b"))
    assert first.group == "plain"
    assert first.logits.high < 0, "without the cue fewer logits"
    assert -first.logits.value > abs(first.label_logits)


def test_the_edit_repairs_the_worst_group_of_images_that_it_was_not_found_on(report):
    methods = {method.name: method for method in report.methods}
    assert methods["zero-shot"].accuracy.worst.value < 0.5
    assert methods["zero-shot"].accuracy.worst_group == "b, green"
    edit = methods["the edit"]
    assert (edit.accuracy.worst.value, edit.accuracy.average.value) == (1.0, 1.0)
    assert edit.change.worst.low > 0.5
    assert (report.interventions[0].layer, report.interventions[0].index) == (0, 0)
    assert report.mode == "rerun"


def test_it_is_compared_with_what_others_would_do(report):
    methods = {method.name: method for method in report.methods}
    assert methods["random features"].accuracy.worst.value < 0.5
    assert methods["Orth-Proj"].accuracy.average.value < methods["the edit"].accuracy.average.value
    assert {"Orth-Cali", "zero-ablation"} & set(methods) >= {"Orth-Cali"}
    assert sum(group.images for group in methods["zero-shot"].accuracy.groups) == report.held_out_images == IMAGES // 2


def test_what_cannot_be_done_is_said(report, table):
    assert report.refused["ablate to mean, rerun"] == "the toy has no mean activations"
    assert not report.left_out
    assert ask(*table).left_out == ["Orth-Proj and Orth-Cali require the cue in words; give --cue"]


def test_the_cue_is_found_in_words(table):
    found = ask(*table, by="cue", cue=("green border",))
    assert (found.ranking[0].layer, found.ranking[0].index) == (0, 0)
    assert found.groups == ["without the cue", "with the cue"]


def test_the_cue_is_found_by_what_moves_the_errors(table):
    found = ask(*table, by="errors")
    assert (found.ranking[0].layer, found.ranking[0].index) == (0, 0)
    edit = next(method for method in found.methods if method.name == "the edit")
    assert edit.accuracy.average.value == 1.0
    truth = [row.group for row in table[1]].count("green")
    cued = [group for group in edit.accuracy.groups if group.group == "with the cue"]
    assert sum(group.images for group in cued) == truth / 2, "the same images as the table says"


def test_images_that_are_not_there_and_those_that_cannot_be_read(table, tmp_path):
    folder, rows = table
    with pytest.raises(DebiasError, match=r"has no file missing\.png; names of images must be paths below --data"):
        ask(folder, [*rows, Row("missing.png", "a", "plain", None)])
    broken = folder / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    found = ask(folder, [*rows, Row("broken.png", "a", "plain", None)])
    assert [line.partition(":")[0] for line in found.unreadable] == ["broken.png"]


def test_nothing_to_repair_is_said(table):
    folder, rows = table
    plain = [row for row in rows if (row.label, row.group) == ("b", "plain")]
    right = [*plain, *plain, *(row for row in rows if row.label == "a")]
    right = [row._replace(group=("one", "other")[number // 2 % 2]) for number, row in enumerate(right)]
    with pytest.raises(DebiasError, match="so there is nothing to repair"):
        ask(folder, right)


def test_what_was_found_is_printed_and_kept_as_evidence(report):
    console = Console(file=io.StringIO(), width=200)
    print_report(report, console)
    printed = console.file.getvalue()
    assert "0/0" in printed
    for method in report.methods:
        assert f"{100 * method.accuracy.worst.value:.1f} (" in printed
    assert report.proposed in printed
    assert "the toy has no mean activations" in printed
    evidence = json.loads(json.dumps(report.evidence("toy.csv")))
    assert evidence["data"] == "toy.csv"
    assert evidence["methods"][1]["change"]["worst"]["value"] == pytest.approx(report.methods[1].change.worst.value)
    assert "green" in report.description
