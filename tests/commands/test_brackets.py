"""Labels, files and folders with square brackets and colons are printed as they are, not read as markup or emoji."""

import pytest
from typer.testing import CliRunner

from vitrine.commands import app


@pytest.fixture
def run(bundle_path, picture, tmp_path, monkeypatch):
    """run(words) -> what the command prints, in a folder with one picture in "[bulk] photos"."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[bulk] photos").mkdir()
    (tmp_path / "[bulk] photos" / "[a].png").write_bytes(picture(seed=0))

    def run(*words):
        result = CliRunner().invoke(app, [*words, "--bundle", str(bundle_path)])
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_attribute(run):
    labels = ["[dog]", "[/bold]", ":cat:"]
    output = run("attribute", "[bulk] photos/[a].png", "--labels", ",".join(labels), "--target", "[/bold]")
    assert "Why [/bold]: the account of its logit" in output
    assert all(f"\n{label} " in output for label in labels)


def test_bulk(run):
    output = run("bulk", "[bulk] photos", "--out", "[red]out", "--labels", "[dog],cat")
    assert "1 rows and 0 errors in [red]out\n" in output
