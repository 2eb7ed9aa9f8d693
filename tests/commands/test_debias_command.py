"""`vitrine debias` on the tiny bundle's own graphs: an edit is written, and what cannot be asked is refused."""

import csv
import json

import pytest

from common import LABELS
from vitrine.models.bundle.manifest import graphs_digest
from vitrine.models.interventions.edit import read_edit


@pytest.fixture(scope="module")
def table(data_root, tmp_path_factory):
    """Waterbirds' columns for the drawn shapes, every other one of group 1."""
    file = tmp_path_factory.mktemp("debias") / "metadata.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["img_filename", "y", "place"])
        for number, label in enumerate(LABELS):
            for place, image in enumerate(sorted((data_root / "train" / label).iterdir())):
                writer.writerow([image.relative_to(data_root / "train").as_posix(), number, place % 2])
    return file


def test_an_edit_is_written_with_its_evidence(run, bundle, data_root, table, tmp_path):
    out, report, page = (tmp_path / name for name in ("shapes.json", "report.json", "report.html"))
    asked = ("--data", data_root / "train", "--groups", table, "--bundle", bundle.path, "--out", out, "--cap", "100")
    result = run(
        "debias", *asked, "--labels", ",".join(LABELS), "--report", report, "--html", page, "--cue", "a red noise"
    )
    found = json.loads(report.read_text())
    assert {"zero-shot", "Orth-Proj", "Orth-Cali"} <= {method["name"] for method in found["methods"]}
    assert "held-out half" in page.read_text()
    assert (result.exit_code == 0) == bool(found["interventions"]), result.output
    if found["interventions"]:  # of random weights: there may be no edit that helps
        edit = read_edit(out)
        assert [item.model_dump() for item in edit.interventions] == found["interventions"]
        assert edit.graphs == graphs_digest(bundle.manifest)
        assert edit.evidence["methods"] == found["methods"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--out", "No.json"), "lower-case letters"),
        (("--out", "no.json", "--columns", "image=a"), "--columns and --splits require --groups"),
        (("--out", "no.json", "--by", "cue"), "requires the cue in words"),
    ],
)
def test_what_cannot_be_asked_is_refused(run, bundle, data_root, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    result = run("debias", "--data", data_root / "train", "--bundle", bundle.path, *arguments)
    assert result.exit_code != 0
    assert said in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "no.json").exists()
