"""Residual SAEs on the command line: exported, listed, followed back."""

import json

import pytest

from vitrine.models.export import residual as export


@pytest.fixture(autouse=True)
def settings(monkeypatch, with_residual):
    """The bundle that has residual SAEs, and wide output."""
    monkeypatch.setenv("VITRINE_BUNDLE", str(with_residual.path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def photo(picture, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(picture())
    return path


def test_export_adds_them_to_a_copy_of_a_bundle(run, bundle, sae_checkpoint, clip, data_root, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(export, "add_residual", lambda *given: asked.append(given) or given[0])
    given = ("--bundle", bundle.path, "--residual", sae_checkpoint, "--data-root", data_root)
    result = run("export", *given, "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    ((opened, loaded, exported, out),) = asked
    assert (opened.digest, loaded.sha256, out) == (bundle.digest, clip.sha256, tmp_path / "new")
    assert exported.saes.architecture.features == (48, 64)
    assert (exported.data.name, exported.data.train_images) == ("drawn shapes", 48)
    assert 'name = "tiny-sae"' in exported.recipe


def test_export_says_what_goes_together(run, bundle, sae_checkpoint, checkpoint, data_root, tmp_path):
    out = ("--out", tmp_path / "new", "--data-root", data_root)
    for arguments, said in (
        ((), "give one of --checkpoint (a CLT), --clip, and"),
        (("--checkpoint", checkpoint, "--bundle", bundle.path), "give one of --checkpoint (a CLT), --clip, and"),
        (("--bundle", bundle.path), "--bundle requires --residual, and takes no labels"),
        (("--bundle", bundle.path, "--residual", sae_checkpoint, "--labels", "a"), "--bundle requires --residual"),
        (("--bundle", bundle.path, "--residual", checkpoint), "residual SAEs are needed here"),
        (("--checkpoint", sae_checkpoint), "a Cross-Layer Transcoder is needed here"),
    ):
        result = run("export", *arguments, *out)
        assert result.exit_code != 0
        assert said in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


def test_a_circuit_by_either_dictionary_and_both_in_one_page(run, photo, tmp_path):
    page, graph = tmp_path / "circuit.html", tmp_path / "graph.json"
    asked = ("circuit", photo, "--nodes", "10", "--dictionary", "residual", "--html", page, "--graph", graph)
    result = run(*asked, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["dictionary"] == "residual"
    assert len(json.loads(graph.read_text())["metadata"]["transcoder_list"]) == 2
    text = page.read_text(encoding="utf-8")
    assert '"dictionary": "residual"' in text
    assert '"dictionary": "clt"' in text
    assert "by residual SAEs" in run(*asked[:6]).output


def test_attribute_lists_features_of_the_stream(run, photo):
    result = run("attribute", photo, "--residual", "--features", "2")
    assert result.exit_code == 0, result.output
    said = result.output
    table = said[said.index("What the residual SAEs read after each block") :].splitlines()
    assert [line.split()[0] for line in table[2:4]] == ["0", "1"]
    assert table[2].count("#") == 4
