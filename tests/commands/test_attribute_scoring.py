"""`vitrine attribute --scoring independent`: each label for itself, and the verdict in a sentence."""

import pytest
from typer.testing import CliRunner

from vitrine.commands import app


@pytest.fixture
def run(monkeypatch, bundle, picture, tmp_path):
    """run(*options) -> typer's result of `vitrine attribute` on a picture."""
    (tmp_path / "photo.png").write_bytes(picture())
    monkeypatch.setenv("VITRINE_BUNDLE", str(bundle.path))
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *options: CliRunner().invoke(app, ["attribute", str(tmp_path / "photo.png"), *options])


def test_none_of_the_labels_or_all_of_them_reach_a_threshold(run, bundle):
    none = run("--scoring", "independent", "--threshold", "1").stdout
    assert "None of these: no label reaches its threshold (the softmax would rank " in none
    every = run("--scoring", "independent", "--threshold", "-1").stdout
    listed = every.partition("These reach their threshold: ")[2].splitlines()[0]
    assert set(listed.split(", ")) == set(bundle.manifest.text.labels)
    assert "threshold" not in run().stdout


@pytest.mark.parametrize("options", [["--scoring", "independent"], ["--threshold", "0.2"]])
def test_one_without_the_other_is_refused_in_a_sentence(run, options):
    refused = run(*options)
    assert refused.exit_code == 2
    assert "give --scoring independent and --threshold together" in " ".join(refused.output.replace("│", " ").split())
