"""Edits as files: whatever is changed in one is found out, and one for another bundle is refused."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.manifest import FileEntry, graphs_digest
from vitrine.models.interventions.edit import (
    MAX_BYTES,
    Condition,
    EditError,
    check_signature,
    create,
    parse_edit,
    read_edit,
    read_key,
)
from vitrine.models.interventions.edit_files import add_edits, bundle_edits, changes_of, read_edits
from vitrine.models.interventions.network import BundleNetwork
from vitrine.models.interventions.spec import Intervention

GRAPHS = "sha256:" + "a" * 64
KEY = b"a secret of sixteen bytes"
ABLATE = (Intervention(op="ablate", layer=1, index=3), Intervention(op="scale", row="mlp", layer=0, value=0.5))
EVIDENCE = {"worst_group": [0.5, 0.75], "card": None, "words": "weiß"}


def make(name="no-snow", graphs=GRAPHS, interventions=ABLATE, mode="direct", **options):
    options = {"evidence": EVIDENCE} | options
    return create(name, "snow behind a husky", interventions, mode, graphs, **options)


def write(folder, edit):
    (folder / f"{edit.name}.json").write_text(edit.text())
    return folder / f"{edit.name}.json"


def parse(text):
    """The edit of a text, as if it were in its file."""
    return parse_edit(Path("no-snow.json"), io.BytesIO(text if isinstance(text, bytes) else text.encode()))


@pytest.mark.parametrize("condition", [None, Condition(moves_logit=0.5), Condition(activation_at_least=2)])
@pytest.mark.parametrize("key", [None, KEY])
def test_an_edit_is_read_as_it_was_made(tmp_path, condition, key):
    edit = make(condition=condition, key=key)
    assert read_edits(write(tmp_path, edit).parent) == {"no-snow": edit}
    assert edit.evidence == EVIDENCE


SIGNED = make(key=KEY).text().encode()


@settings(max_examples=500, deadline=None)
@given(place=st.integers(0, len(SIGNED) - 1), byte=st.integers(0, 255))
def test_no_byte_can_be_changed_that_means_anything(place, byte):
    try:
        edit = parse(SIGNED[:place] + bytes([byte]) + SIGNED[place + 1 :])
        check_signature(edit, KEY)
    except EditError:
        return
    assert edit == parse(SIGNED)  # the same byte, or white space


def changed(**fields):
    return json.dumps(json.loads(SIGNED) | fields)


WRONG = {
    "no JSON": ("ablate", "is not JSON"),
    "not UTF-8": (b'{"format": 1, "name": "\xff"}', "is not JSON"),
    "twice the same name": (SIGNED.replace(b'"mode"', b'"graphs"'), "a name is given twice"),
    "not a number": (SIGNED.replace(b"0.75", b"NaN"), "NaN is not a JSON number"),
    "too deep": ('{"format": 1, "evidence": ' + 100_000 * "[", "is not JSON"),
    "a list": ("[]", "has no `format`"),
    "of a later version": (changed(format=2), "has the format 2; this version of Vitrine reads 1"),
    "another value": (changed(mode="rerun"), "its digest does not match"),
    "another name": (changed(name="snow"), "its digest does not match"),
    "no interventions": (changed(interventions=[]), "interventions: "),
    "a field that is none": (changed(force=True), "force: "),
    "half a character": (changed(evidence={"a": "\ud800"}), "surrogates not allowed"),
    "too large": (changed(evidence={"a": MAX_BYTES * "x"}), f"is larger than {MAX_BYTES:,} bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_by_name(case):
    text, message = WRONG[case]
    with pytest.raises(EditError, match=rf"no-snow\.json.*{re.escape(message)}"):
        parse(text)


def test_a_file_under_another_name_is_refused(tmp_path):
    file = write(tmp_path, make()).rename(tmp_path / "other.json")
    with pytest.raises(EditError, match=r"other\.json is the edit 'no-snow': name the file no-snow\.json"):
        read_edit(file)


@pytest.mark.parametrize("name", ["none", "No-Snow", "no snow", ".snow", "x" * 65, "../snow", ""])
def test_a_wrong_name_is_refused(name):
    with pytest.raises(EditError, match="the name of an edit must consist of"):
        make(name)


def test_what_cannot_be_written_is_refused():
    for options in ({"evidence": {"a": float("nan")}}, {"evidence": {"a": MAX_BYTES * "x"}}, {"interventions": ()}):
        with pytest.raises(EditError, match="edit 'no-snow'"):
            make(**options)


@pytest.mark.parametrize("fields", [{}, {"moves_logit": 1, "changes_prediction": True}, {"moves_logit": 0}])
def test_a_condition_is_one(fields):
    with pytest.raises(ValueError, match=r"give exactly one of|greater than 0"):
        Condition(**fields)


def test_a_condition_on_activations_needs_features():
    for interventions in (ABLATE[1:], (Intervention(op="ablate", layer=0, index=1, dictionary="residual"),)):
        with pytest.raises(EditError, match="this edit changes none"):
            make(interventions=interventions, mode="rerun", condition=Condition(activation_at_least=1))


def test_signatures_are_of_one_key():
    check_signature(make(key=KEY), KEY)
    with pytest.raises(EditError, match="signed by another key"):
        check_signature(make(key=KEY), KEY + b"!")
    with pytest.raises(EditError, match="is not signed"):
        check_signature(make(), KEY)


def test_a_key_file_is_read_without_its_line_end(tmp_path):
    file = tmp_path / "key"
    file.write_bytes(KEY + b"\n")
    assert read_key(file) == KEY
    for content in (b"short", b"", b"x" * 5_000):
        file.write_bytes(content)
        with pytest.raises(EditError, match="must have 16 to 4,096 bytes"):
            read_key(file)
    with pytest.raises(EditError, match="nowhere cannot be read"):
        read_key(tmp_path / "nowhere")


# In a bundle


@pytest.fixture(scope="module")
def edited(bundle, tmp_path_factory):
    """(the tiny bundle with an edit for it, the edit)."""
    edit = make(graphs=graphs_digest(bundle.manifest))
    return add_edits(bundle, {edit.name: edit}, tmp_path_factory.mktemp("edited") / "tiny"), edit


def test_a_bundle_brings_its_edits_and_they_fit_it(edited, bundle):
    with_edit, edit = edited
    opened = open_bundle(with_edit.path)
    assert opened == with_edit
    assert bundle_edits(opened) == {"no-snow": edit}
    assert bundle_edits(bundle) == {}
    assert opened.digest != bundle.digest
    changes = changes_of(edit, opened, BundleNetwork(opened))
    assert (changes.layers.tolist(), changes.indices.tolist()) == ([1], [3])
    np.testing.assert_array_equal(changes.gains, -1)
    again = add_edits(opened, {edit.name: make(graphs=edit.graphs, key=KEY)}, with_edit.path.with_name("signed"))
    assert bundle_edits(again)["no-snow"].signature


def test_an_edit_in_a_bundle_is_sealed(edited, tmp_path):
    path = shutil.copytree(edited[0].path, tmp_path / "changed")
    file = path / "edits" / "no-snow.json"
    file.write_text(file.read_text().replace("husky", "hasky"))
    with pytest.raises(BundleError, match=r"no-snow\.json does not have the sha256 of the manifest"):
        open_bundle(path)


def with_file(bundle, name):
    """A manifest with one more file, or another one."""
    files = bundle.manifest.files | {name: FileEntry(sha256=64 * "b", bytes=1)}
    return bundle.manifest.model_copy(update={"files": files})


def test_an_edit_of_another_bundle_is_refused(bundle):
    edit = make(graphs=graphs_digest(bundle.manifest))
    other = replace(bundle, manifest=with_file(bundle, "directions.npy"))
    with pytest.raises(EditError, match="edit 'no-snow' was made for a different bundle, not for 'tiny'"):
        changes_of(edit, other, BundleNetwork(other))


@pytest.mark.parametrize(
    "name", ["cards/features.parquet", "label_sets/pets.npy", "residual_trace.onnx", "edits/snow.json", "MODEL_CARD.md"]
)
def test_an_edit_stays_one_of_its_bundle_when_something_is_laid_beside_the_graphs(bundle, name):
    assert graphs_digest(with_file(bundle, name)) == graphs_digest(bundle.manifest)


def test_an_edit_of_residual_features_is_of_their_graphs_too(bundle):
    edit = make(interventions=(Intervention(op="ablate", layer=0, index=1, dictionary="residual"),), mode="rerun")
    assert edit.of_residual
    before, after = (graphs_digest(m, residual=True) for m in (bundle.manifest, with_file(bundle, "residual_x.onnx")))
    assert before != after


def test_a_feature_that_does_not_exist_is_refused(bundle):
    interventions = (Intervention(op="ablate", layer=1, index=64),)
    edit = make(graphs=graphs_digest(bundle.manifest), interventions=interventions)
    with pytest.raises(EditError, match="edit 'no-snow': intervention 0: layer 1 of clt has features 0 to 63, not 64"):
        changes_of(edit, bundle, BundleNetwork(bundle))
