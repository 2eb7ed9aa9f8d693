"""`vitrine attribute --attention`: why a head looks where it does, in the terminal."""

import json
import re

import pytest
from typer.testing import CliRunner

from vitrine.commands import app


@pytest.fixture
def run(monkeypatch, carded, picture, tmp_path):
    """run(*options) -> typer's result of `vitrine attribute` on a picture, with the tiny bundle."""
    (tmp_path / "photo.png").write_bytes(picture())
    monkeypatch.setenv("VITRINE_BUNDLE", str(carded.path))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *options: CliRunner().invoke(app, ["attribute", str(tmp_path / "photo.png"), *options])


def table(output, title):
    """[(row, number, the rest of its line)] of the table below a title."""
    text = output[output.index(title) :].split("\n\n")[0]
    found = [re.fullmatch(r" (\S+(?: \S+)*) +([+-]?\d\S*)(.*)", line) for line in text.splitlines()[2:]]
    return [(match[1], float(match[2]), match[3]) for match in found]


def test_three_accounts_of_one_score(run):
    result = run("--attention", "2/1")
    assert result.exit_code == 0, result.output
    theirs = json.loads(run("--attention", "2/1", "--json").stdout)["attention"]
    said = f"Head 1 of layer 2 attends from [CLS] to token {theirs['key']} (patch in row "
    assert said in result.output or theirs["key"] == 0
    assert f"with {theirs['weight']:.1%} of its attention" in result.output
    assert f"score {theirs['score']:.3f} minus its mean over all keys, {theirs['mean_score']:.3f}." in result.output
    for title, name in (("What made the query", "of_query"), ("What made the key", "of_key")):
        *rows, remainder, score = table(result.output, title)
        assert (remainder[0], score[0]) == ("remainder", "score")
        for (row, value, rest), feature in zip(rows[:12], theirs[name]["features"], strict=True):
            assert row == f"layer {feature['layer']} #{feature['index']}"
            assert value == pytest.approx(feature["contribution"], abs=6e-4)
            assert rest.rstrip().endswith(feature["label"] or "")
        assert [row for row, _, _ in rows[12:]] == ["other features", "error", "embeddings", "biases", "constants"]
        assert sum(value for _, value, _ in rows) == pytest.approx(theirs["explained"], abs=6e-4 * len(rows))
        assert score[1] == pytest.approx(theirs["explained"], abs=6e-4)
    *pairs, rest, _, score = table(result.output, "Pairs of features")
    for (row, value, _), pair in zip(pairs, theirs["pairs"], strict=True):
        ends = [f"{pair[end]['layer']}/{pair[end]['index']}" for end in ("query", "key")]
        assert row == " · ".join(ends)
        assert value == pytest.approx(pair["contribution"], abs=6e-4)
    assert rest[0] == "all others"
    assert sum(value for _, value, _ in (*pairs, rest)) == pytest.approx(score[1], abs=6e-4 * 14)


def test_tokens_may_be_named(run):
    output = run("--attention", "1/0/5/16").output
    assert "attends from token 5 (patch in row 2, column 1) to token 16 (patch in row 4, column 4)" in output
    assert "attends from token 3 (patch in row 1, column 3) to" in run("--attention", "1/0/3").output


def test_a_layer_that_reads_no_feature_has_no_pairs(run):
    output = run("--attention", "0/0").output
    assert "What made the key" in output
    assert "Pairs of" not in output


def test_who_does_not_ask_sees_none(run):
    assert "attends from" not in run().output


@pytest.mark.parametrize("text", ["2", "2/", "a/b", "1/0/5/16/2", "-1/0", "1/0x2"])
def test_what_is_no_head_is_wrong_use(run, text):
    result = run("--attention", text)
    assert result.exit_code == 2
    assert "LAYER/HEAD" in result.stderr


def test_a_head_that_is_not_there(run):
    result = run("--attention", "1/4")
    assert result.exit_code == 1
    assert "`explain.attention.head` is 4; this CLIP allows 0 to 3" in result.stderr
