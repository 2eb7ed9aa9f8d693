"""Files of named label sets: an invalid file is refused with its name."""

import json

import numpy as np
import pytest

from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.label_sets import LabelSetError, NamedLabels, read_label_set, read_label_sets
from vitrine.models.bundle.sealing import seal
from vitrine.models.export.export import export_bundle


def write(folder, content, name="pets.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


def test_every_json_file_of_a_folder_is_a_set(tmp_path):
    write(tmp_path, {"labels": [" cat ", "dog"]})
    write(tmp_path, {"labels": ["oak"], "templates": ["a {} tree", "{}"]}, "trees-2.json")
    write(tmp_path, "not one", "README.md")
    assert read_label_sets(tmp_path) == {
        "pets": NamedLabels(labels=("cat", "dog")),
        "trees-2": NamedLabels(labels=("oak",), templates=("a {} tree", "{}")),
    }


WRONG = {
    "no JSON": "cat, dog",
    "not UTF-8": '{"labels": ["\udcff"]}',
    "a list": ["cat"],
    "no labels": {"labels": []},
    "labels missing": {"templates": ["{}"]},
    "twice the same": {"labels": ["cat", "dog", "cat "]},
    "blank label": {"labels": ["cat", " "]},
    "a number": {"labels": ["cat", 1]},
    "no templates": {"labels": ["cat"], "templates": []},
    "template without {}": {"labels": ["cat"], "templates": ["a photo"]},
    "unknown key": {"labels": ["cat"], "label": "x"},
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file_is_refused_by_name(tmp_path, case):
    file = tmp_path / "pets.json"
    content = WRONG[case] if isinstance(WRONG[case], str) else json.dumps(WRONG[case])
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(LabelSetError, match=r"pets\.json: "):
        read_label_set(file)


@pytest.mark.parametrize("name", ["default", "Pets", "my pets", ".hidden", "x" * 65, "été"])
def test_wrong_name_is_refused(tmp_path, name):
    with pytest.raises(LabelSetError, match="the name of a label set must consist of"):
        read_label_set(write(tmp_path, {"labels": ["cat"]}, f"{name}.json"))


def test_missing_folder_and_unreadable_file_are_named(tmp_path):
    with pytest.raises(LabelSetError, match="nowhere is not a directory of label sets"):
        read_label_sets(tmp_path / "nowhere")
    (tmp_path / "pets.json").mkdir()
    with pytest.raises(LabelSetError, match=r"pets\.json cannot be read"):
        read_label_sets(tmp_path)


@pytest.fixture(scope="module")
def labelled(clip, clt, cls_mean, provenance, conversions, tmp_path_factory):
    """The tiny bundle with two label sets."""
    sets = {"pets": NamedLabels(labels=("cat", "dog")), "trees": NamedLabels(labels=("oak",), templates=("a {} tree",))}
    out = tmp_path_factory.mktemp("labelled") / "bundle"
    with conversions.remembered():
        return export_bundle(clip, clt, cls_mean, provenance, out, label_sets=sets)


def test_bundle_brings_its_sets_and_their_embeddings(labelled, clip, provenance):
    assert set(labelled.label_sets) == {"pets", "trees"}
    for named, embeddings in labelled.label_sets.values():
        expected = clip.encode_labels(list(named.labels), list(named.templates or provenance.templates))
        np.testing.assert_array_equal(embeddings, expected.numpy())
    assert open_bundle(labelled.path).label_sets.keys() == labelled.label_sets.keys()


def test_set_that_does_not_fit_its_embeddings_is_refused(labelled):
    file = labelled.path / "label_sets" / "pets.json"
    for content, message in (('{"labels": ["cat"]}', "the manifest says"), ("{}", r"pets\.json: labels: ")):
        file.write_text(content)
        with pytest.raises(BundleError, match=message):
            _ = seal(labelled.path, labelled.manifest).label_sets
