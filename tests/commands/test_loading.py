"""`vitrine.load` of a run: exported once, and kept by the checkpoint's digest."""

import shutil

import pytest

import vitrine
from vitrine.models.bundle.bundle import BundleError
from vitrine.training import export


@pytest.fixture
def cache(tmp_path, monkeypatch, data_root):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("VITRINE_DATA", str(data_root))
    return tmp_path / "cache" / "vitrine"


@pytest.mark.usefixtures("remembered_conversions")
def test_a_run_is_exported_once(checkpoint, cache, picture, monkeypatch, capsys, tmp_path):
    with vitrine.load(checkpoint.parent) as explainer:
        account = explainer.explain(picture())
    assert "once" in capsys.readouterr().err
    (kept,) = cache.iterdir()
    assert explainer.bundle.path == kept
    asked = []
    monkeypatch.setattr(export, "export_checkpoint", lambda *_, **__: asked.append(1))
    with vitrine.load(checkpoint) as again:  # the same, by its own name
        assert again.explain(picture()).ledger == account.ledger
    assert not asked
    other = shutil.copytree(checkpoint, tmp_path / "other")
    (other / "checkpoint.json").write_text((other / "checkpoint.json").read_text() + " ")
    with pytest.raises(BundleError):  # nothing is written in its place
        vitrine.load(other)
    assert asked


def test_what_is_neither_bundle_nor_run_is_named(cache, tmp_path):
    with pytest.raises(vitrine.VitrineError, match="neither a bundle"):
        vitrine.load(tmp_path / "none")
    assert not cache.exists()
