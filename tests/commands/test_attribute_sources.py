"""`vitrine attribute --sources`: the source account in the terminal."""

import json
import re

import pytest
from typer.testing import CliRunner

from vitrine.commands import app

LABELS = ["--labels", "cat,dog,frog", "--target", "dog", "--contrast", "cat"]


@pytest.fixture
def run(monkeypatch, carded, picture, tmp_path):
    """run(*options) -> typer's result of `vitrine attribute` on a picture, with the tiny bundle."""
    (tmp_path / "photo.png").write_bytes(picture())
    monkeypatch.setenv("VITRINE_BUNDLE", str(carded.path))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *options: CliRunner().invoke(app, ["attribute", str(tmp_path / "photo.png"), *options])


def printed(output):
    """[(row, logits, the rest of its line)] of the source account."""
    text = output[output.index("followed back through attention") :].split("\n\n")[0]
    found = [re.fullmatch(r" (\S+(?: \S+)*) +([+-]?\d\S*)(.*)", line) for line in text.splitlines()[2:]]
    return [(match[1], float(match[2]), match[3]) for match in found]


def account(run, *options):
    (explanation,) = json.loads(run("--json", *options).stdout)["explanations"]
    return explanation["sources"]


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_the_rows_are_the_accounts_and_add_up_to_its_logit(run, baseline):
    options = ["--sources", "--source-features", "7", "--baseline", baseline, *LABELS]
    result = run(*options)
    assert result.exit_code == 0, result.output
    about = ", relative to the average image" if baseline == "mean" else ""
    assert f"Why dog rather than cat: followed back through attention{about} " in result.output
    theirs, (*rows, remainder, logit) = account(run, *options), printed(result.output)
    assert (remainder[0], logit[0]) == ("remainder", "logit")
    for (name, value, rest), feature in zip(rows[:7], theirs["features"], strict=True):
        assert name == f"layer {feature['layer']} #{feature['index']}"
        assert value == pytest.approx(feature["contribution"], abs=6e-4)
        assert rest.rstrip().endswith(feature["label"] or "")
    assert any(feature["label"] for feature in theirs["features"])
    listed = sum(feature["contribution"] for feature in theirs["features"])
    assert rows[7][1] == pytest.approx(sum(layer["features"] for layer in theirs["layers"]) - listed, abs=6e-4)
    names = ["other features", "error", "embeddings", "biases", "constants"]
    names += ["baseline", "silent"] if baseline == "mean" else []
    assert [name for name, _, _ in rows[7:]] == names
    assert logit[1] == pytest.approx(theirs["logit"], abs=6e-4)
    assert sum(value for _, value, _ in rows) == pytest.approx(logit[1], abs=6e-4 * len(rows))
    assert f"{theirs['error_share']:.1%} of this account" in rows[8][2]


def test_every_target_has_its_own(run):
    output = run("--sources", "--labels", "cat,dog", "--target", "cat", "--target", "dog").output
    titles = re.findall(r"^Why .*", output, re.MULTILINE)
    assert [title.rstrip() for title in titles] == [
        f"Why {label}: {what}"
        for label in ("cat", "dog")
        for what in ("the account of its logit", "followed back through attention")
    ]


def test_who_does_not_ask_sees_none(run):
    assert "followed back" not in run().output
    assert account(run) is None


def test_a_baseline_is_of_sources(run):
    result = run("--baseline", "mean")
    assert result.exit_code == 1
    assert "set both" in result.stderr
    assert run("--sources", "--baseline", "median").exit_code == 2
