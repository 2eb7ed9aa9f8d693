"""Source accounts in bulk runs: the service's own, resumed as they were begun, refused before an image is read."""

import asyncio
import json
import shutil

import duckdb
import pytest
from rich.console import Console
from typer.testing import CliRunner

from vitrine.commands import app
from vitrine.models.bundle.sealing import seal
from vitrine.models.inputs.opening import open_inputs
from vitrine.service.answers.attribute import answer_attribute
from vitrine.service.answers.attributor import Attributor
from vitrine.service.errors import ServiceError
from vitrine.service.offline.bulk.errors import BulkError
from vitrine.service.offline.bulk.job import make_job
from vitrine.service.offline.bulk.run import Summary, bulk
from vitrine.service.offline.bulk.work import Work
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import AttributeRequest

SETTINGS = Settings(batch_size=2)
COUNT = 5


@pytest.fixture(scope="module")
def photos(picture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(picture(seed=number))
    return folder


@pytest.fixture
def start(carded, photos, tmp_path):
    """start(bundle=carded, settings=SETTINGS, **explain) -> `Summary` of a run into `tmp_path / "out"`."""

    def begin(bundle=carded, settings=SETTINGS, **explain):
        opened = open_inputs(str(photos))
        job = make_job(bundle, settings, opened, AttributeRequest(explain=explain), path=str(photos), part_size=3)
        return bulk(bundle, Work(job, opened, tmp_path / "out", settings), Console(quiet=True))

    return begin


def read(out):
    with duckdb.connect() as database:
        table = database.read_parquet([str(path) for path in sorted(out.glob("part-*.parquet"))])
        return [dict(zip(table.columns, row, strict=True)) for row in table.fetchall()]


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_they_are_those_of_the_service(start, carded, photos, tmp_path, baseline):
    explain = {"sources": True, "source_features": 4, "baseline": baseline}
    assert start(**explain) == Summary(COUNT, 0)

    async def answers():
        async with Attributor(carded, SETTINGS) as attributor:
            return [
                await answer_attribute(attributor, path.read_bytes(), AttributeRequest(explain=explain), "x")
                for path in sorted(photos.iterdir())
            ]

    labelled = 0
    for row, answer in zip(read(tmp_path / "out"), asyncio.run(answers()), strict=True):
        (explanation,) = answer.explanations
        ours, theirs = row["sources"], explanation.sources.model_dump()
        assert row["ledger"]["target"] == explanation.target
        assert ours.keys() == {"logit", "features", "error_share", "remainder"}
        assert ours["logit"] == pytest.approx(theirs["logit"], abs=1e-4)
        assert ours["error_share"] == pytest.approx(theirs["error_share"], abs=1e-4)
        assert abs(ours["remainder"]) <= 1e-3
        assert len(ours["features"]) == 4
        for feature, expected in zip(ours["features"], theirs["features"], strict=True):
            del expected["tokens"]
            assert feature == {
                name: pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
                for name, value in expected.items()
            }
        labelled += sum(feature["label"] is not None for feature in ours["features"])
    assert labelled


def test_who_does_not_ask_has_no_column_and_loads_no_graphs(start, tmp_path, monkeypatch):
    monkeypatch.setattr("vitrine.service.engine.engine.SourceGraphs", None)
    start()
    assert all("sources" not in row for row in read(tmp_path / "out"))


def test_a_run_is_taken_up_with_the_same_sources_only(start, tmp_path):
    out = tmp_path / "out"
    start(sources=True, source_features=2)
    before = read(out)
    assert {name: json.loads((out / "_job.json").read_text())[name] for name in ("sources", "baseline")} == {
        "sources": 2,
        "baseline": "zero",
    }
    for explain, message in (
        ({"sources": True, "source_features": 3}, "sources was 2 and is now 3"),
        ({}, "sources was 2 and is now 0"),
        ({"sources": True, "source_features": 2, "baseline": "mean"}, "baseline was zero and is now mean"),
    ):
        with pytest.raises(BulkError, match=f"started with other options: {message}. Give"):
            start(**explain)
    (out / "part-000001.parquet").unlink()
    assert start(sources=True, source_features=2) == Summary(COUNT, 0)
    assert read(out) == before


def test_a_folder_begun_before_there_were_sources_is_taken_up(start, tmp_path):
    start()
    file = tmp_path / "out" / "_job.json"
    job = json.loads(file.read_text())
    del job["sources"], job["baseline"]
    file.write_text(json.dumps(job))
    (tmp_path / "out" / "part-000001.parquet").unlink()
    assert start() == Summary(COUNT, 0)
    with pytest.raises(BulkError, match="sources was 0 and is now 1"):
        start(sources=True, source_features=1)


def test_a_bundle_without_them_is_refused_before_an_image_is_read(start, bundle, photos, tmp_path, monkeypatch):
    path = shutil.copytree(bundle.path, tmp_path / "without")
    for name in ("sources.onnx", "sources.onnx.data", "trace.onnx", "manifest.json"):
        (path / name).unlink(missing_ok=True)
    without = seal(path, bundle.manifest)
    with pytest.raises(ServiceError, match="needs source graphs in the bundle 'tiny': it was exported without them"):
        start(without, sources=True)
    with pytest.raises(ServiceError, match="VITRINE_SOURCES=false"):
        start(settings=Settings(sources=False), sources=True)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("vitrine.models.inputs.opening.open_inputs", None)
    arguments = ["bulk", str(photos), "--out", str(tmp_path / "out"), "--bundle", str(path), "--sources", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "exported without them" in result.stderr


def test_the_commands_options(carded, photos, tmp_path):
    def run(*options):
        return CliRunner().invoke(
            app, ["bulk", str(photos), "--out", str(tmp_path / "out"), "--bundle", str(carded.path), *options]
        )

    refused = run("--baseline", "mean")
    assert refused.exit_code == 1
    assert "set both" in refused.stderr
    assert run("--sources", "3", "--baseline", "mean").exit_code == 0
    assert [len(row["sources"]["features"]) for row in read(tmp_path / "out")] == [3] * COUNT
    assert json.loads((tmp_path / "out" / "_job.json").read_text())["baseline"] == "mean"
