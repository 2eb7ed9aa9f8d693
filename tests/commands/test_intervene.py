"""`vitrine intervene`: before, after and the difference in the terminal."""

import json
import re

import pytest
from typer.testing import CliRunner

from vitrine.commands import app


@pytest.fixture
def run(monkeypatch, bundle, picture, tmp_path):
    """run(*options) -> typer's result of `vitrine intervene` on a picture, with the tiny bundle."""
    (tmp_path / "photo.png").write_bytes(picture())
    monkeypatch.setenv("VITRINE_BUNDLE", str(bundle.path))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")
    options = ["intervene", str(tmp_path / "photo.png"), "--labels", "cat,dog,frog"]
    return lambda *more: CliRunner().invoke(app, [*options, *more])


def test_changes_are_printed_and_are_those_of_the_json(run, tmp_path):
    (tmp_path / "edits.json").write_text('[{"op": "ablate", "row": "clt", "layer": 1}]')
    options = ["--edits", str(tmp_path / "edits.json"), "--edit", "scale attention 2 0.5", "--edit", "ablate error"]
    answer, output = json.loads(run(*options, "--json").stdout), run(*options).output
    (result,) = answer["results"]
    assert [edit["row"] for edit in result["edits"]] == ["clt", "attention", "error"]
    (change,) = result["difference"]["explanations"]
    assert f"{change['target']}: its logit changes by {change['logit']:+.3f}" in output
    printed = dict(re.findall(r"^ (CLT 1|attention 2|error) +([+-]\S+)", output, re.MULTILINE))
    ledger = change["ledger"]
    expected = {"CLT 1": ledger["clt"][1], "attention 2": ledger["attention"][2], "error": ledger["error"]}
    assert printed == {name: f"{value:+.3f}" for name, value in expected.items()}
    for row in result["difference"]["probabilities"]:
        assert re.search(rf"^{row['label']} +{row['before']:.1%} +{row['after']:.1%}", output, re.MULTILINE)
    assert "mode direct" in output
    assert "mode rerun" in run("--mode", "rerun", "--edit", "ablate 0/1").output


def test_a_counterfactual_is_printed_with_the_way_there(run):
    ranked = json.loads(run("--edit", "scale bias 1", "--json").stdout)["before"]["predictions"]
    assert "comes first already" in run("--counterfactual", ranked[0]["label"]).output
    options = ["--counterfactual", ranked[-1]["label"], "--of", "patches", "--seconds", "60"]
    found, output = json.loads(run(*options, "--json").stdout)["counterfactual"], run(*options).output
    assert found["path"]
    assert len(re.findall(r"^ patch in row \d, column \d .*%", output, re.MULTILINE)) == len(found["path"])
    assert ("comes first without these" if found["found"] else f"No solution was found: {found['stopped']}") in output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give --edit, --edits or --counterfactual"),
        (["--edit", "remove 1/2"], "begin with one of"),
        (["--edit", "ablate 9/2"], "there is no layer 9, only layers 0 to 2"),
        (["--counterfactual", "unicorn"], "not among the labels"),
        (["--counterfactual", "cat", "--edit", "ablate 1/2"], "cannot be used together"),
    ],
)
def test_what_cannot_be_asked(run, options, said):
    result = run(*options)
    assert result.exit_code in (1, 2)
    assert said in " ".join(result.output.replace("│", " ").split())
