"""`vitrine edit`, and the commands that take an edit by its name."""

import json

import duckdb
import pytest
from typer.testing import CliRunner

from common import LABELS
from vitrine.commands import app
from vitrine.models.interventions.edit import read_edit
from vitrine.models.interventions.edit_files import bundle_edits
from vitrine.service.offline.verify import verify

ALL = json.dumps([{"op": "ablate", "layer": 1, "index": index} for index in range(64)])


@pytest.fixture(autouse=True)
def editable(monkeypatch, bundle_path):
    monkeypatch.setenv("VITRINE_BUNDLE", str(bundle_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def key(tmp_path):
    (tmp_path / "key").write_bytes(b"a secret of sixteen bytes\n")
    return tmp_path / "key"


@pytest.fixture
def layer_1(tmp_path):
    """A file of interventions: every feature of layer 1 is ablated."""
    (tmp_path / "all.json").write_text(ALL)
    return tmp_path / "all.json"


def create(name, *arguments, code=0):
    return run("edit", "create", name, "--description", "for tests", *arguments, code=code)


def test_an_edit_is_made_measured_shown_listed_and_verified(tmp_path, key, layer_1, data_root):
    (tmp_path / "evidence.json").write_text('{"card": {"label": "mat"}}')
    (tmp_path / "edits").mkdir()
    options = ["--interventions", layer_1, "--evidence", tmp_path / "evidence.json", "--key-file", key]
    output = create("no-mat", *options, "--images", data_root / "val", "--out", tmp_path / "edits")
    edit = read_edit(tmp_path / "edits" / "no-mat.json")
    assert f"no-mat {edit.digest}, signed" in output
    measured = edit.evidence["measured"]
    assert (edit.evidence["card"], measured["images"], measured["applied"]) == ({"label": "mat"}, 12, 1)
    assert sorted(one["label"] for one in measured["classes"]) == sorted(LABELS)
    assert measured["after"] == pytest.approx(sum(one["after"] * one["images"] for one in measured["classes"]) / 12)
    assert all(label in output for label in LABELS)
    folder = ("--edits", tmp_path / "edits")
    assert json.loads(run("edit", "show", "no-mat", *folder)) == json.loads(edit.text())
    assert edit.digest[:19] in run("edit", "list", *folder)
    assert "no edits" in run("edit", "list")
    assert "signed by the key" in run("edit", "verify", tmp_path / "edits" / "no-mat.json", "--key-file", key)
    (tmp_path / "edits" / "no-mat.json").write_text(edit.text().replace("for tests", "for others"))
    assert "was changed after it was made" in run("edit", "verify", *folder, code=1)


def test_an_edit_is_written_into_a_new_bundle_and_used_by_name(tmp_path, layer_1, data_root, bundle):
    create("no-mat", "--interventions", layer_1, "--when", "moves_logit=1e-6", "--into", tmp_path / "with-edit")
    opened = verify(tmp_path / "with-edit")
    (edit,) = bundle_edits(opened).values()
    assert edit.condition.moves_logit == 1e-6
    assert opened.manifest.files.keys() - bundle.manifest.files.keys() == {"edits/no-mat.json"}
    photos = data_root / "val" / LABELS[0]
    options = ("--bundle", opened.path, "--edit", "no-mat")
    assert f"edit no-mat ({edit.digest[:19]}…, direct): applied" in run("attribute", photos / "00.png", *options)
    run("bulk", photos, "--out", tmp_path / "edited", *options)
    job = json.loads((tmp_path / "edited" / "_job.json").read_text())
    assert (job["edit"], job["edit_digest"]) == ("no-mat", edit.digest)
    run("bulk", photos, "--out", tmp_path / "plain", "--bundle", opened.path)
    logits = {
        name: duckdb.sql(f"SELECT predictions[1].logit FROM '{tmp_path / name}/*.parquet' ORDER BY id").fetchall()
        for name in ("plain", "edited")
    }
    assert len(logits["plain"]) == 4
    assert logits["plain"] != logits["edited"]
    assert duckdb.sql(f"SELECT edited FROM '{tmp_path / 'edited'}/*.parquet'").fetchall() == 4 * [(True,)]
    refused = run("bulk", photos, "--out", tmp_path / "edited", "--bundle", opened.path, code=1)
    assert "edit was no-mat and is now None" in refused


def test_what_cannot_be_made_is_refused(tmp_path, layer_1):
    made = ("--out", tmp_path / "no-mat.json")
    one = ("--edit", '{"op": "ablate", "layer": 1, "index": 64}')
    assert "layer 1 of clt has features 0 to 63, not 64" in create("no-mat", *one, *made, code=1)
    assert "interventions.0: " in create("no-mat", "--edit", '{"op": "ablate"}', *made, code=1)
    assert "interventions: " in create("no-mat", *made, code=1)
    assert "give either --out, to write a file, or --into" in create("no-mat", *one, code=2)
    assert "is not JSON" in create("no-mat", "--edit", "ablate", *made, code=2)
    assert "moves_logit" in create("no-mat", *one, "--when", "moves=1", *made, code=2)
    assert "name the file no-mat.json" in create("no-mat", *one, "--out", tmp_path / "other.json", code=2)
    assert not list(tmp_path.glob("*mat*"))
    assert "no edit 'nowhere'; available: none" in run("edit", "show", "nowhere", code=1)


@pytest.mark.parametrize("command", ["create", "show", "list", "verify"])
def test_every_edit_command_has_an_example(command):
    assert f"Example: vitrine edit {command}" in run("edit", command, "--help")
