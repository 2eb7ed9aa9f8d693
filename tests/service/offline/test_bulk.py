"""Bulk runs in this process: answers, broken images, every kind of input, what is refused, what a killed run leaves."""

import asyncio
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from importlib.util import find_spec

import duckdb
import numpy as np
import pandas
import polars
import pytest
from pyarrow import dataset
from rich.console import Console

from vitrine.models.bundle.manifest import graphs_digest
from vitrine.models.files.errors import FileError
from vitrine.models.inputs import shards
from vitrine.models.inputs import source as sources
from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.opening import open_inputs
from vitrine.models.interventions.edit import create
from vitrine.models.interventions.spec import Intervention
from vitrine.service.answers.attribute import answer_attribute
from vitrine.service.answers.attributor import Attributor
from vitrine.service.errors import ServiceError
from vitrine.service.offline.bulk import run, tables, work
from vitrine.service.offline.bulk.errors import BulkError
from vitrine.service.offline.bulk.job import Job, lock_output, make_job
from vitrine.service.offline.bulk.run import Summary, bulk
from vitrine.service.offline.bulk.work import Work
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import AttributeRequest, Explain

SETTINGS = Settings(batch_size=4)
COUNT = 10  # pictures in `photos`


@pytest.fixture(scope="module")
def photos(picture, tmp_path_factory):
    """A folder of ten pictures, some of them in subfolders, and hidden files, which are not images."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for number in range(COUNT):
        place = folder if number < 6 else folder / "deep" / "er"
        (place / f"{number:02}.png").write_bytes(picture(seed=number))
    (folder / ".hidden" / "00.png").write_bytes(b"none")
    (folder / ".DS_Store").write_bytes(b"none")
    return folder


@pytest.fixture(scope="module")
def start(bundle):
    """start(inputs, out, column=None, settings=SETTINGS, bundle=bundle, part_size=4, ray_workers=0, **request) ->
    `Summary` of a run in this process."""
    default_bundle = bundle

    def begin(
        source, out, column=None, settings=SETTINGS, bundle=None, part_size=4, ray_workers=0, console=None, **request
    ):
        bundle, opened = bundle or default_bundle, open_inputs(str(source), column)
        parsed = AttributeRequest(**request)
        job = make_job(bundle, settings, opened, parsed, path=str(source), column=column, part_size=part_size)
        return bulk(bundle, Work(job, opened, out, settings), console or Console(quiet=True), ray_workers)

    return begin


def read(folder):
    """Rows of a folder's parts, as dicts, in the order of the files."""
    files = sorted(map(str, folder.glob("part-*.parquet")))
    if not files:
        return []
    with duckdb.connect() as database:
        table = database.read_parquet(files)
        return [dict(zip(table.columns, row, strict=True)) for row in table.fetchall()]


@pytest.fixture(scope="module")
def found(start, photos, tmp_path_factory):
    """The rows of `photos`."""
    out = tmp_path_factory.mktemp("found") / "out"
    assert start(photos, out) == Summary(COUNT, 0)
    return read(out)


def test_answers_are_those_of_the_service(carded, start, photos, tmp_path):
    request = {"labels": ["cat", "dog", "frog", "boat"], "templates": ["a photo of a {}", "one {}"], "top_k": 3}
    start(photos, tmp_path / "out", bundle=carded, explain={"features": 4}, **request)
    rows = read(tmp_path / "out")
    full_request = AttributeRequest(explain=Explain(features=carded.manifest.shape.k), **request)

    async def answers():
        async with Attributor(carded, SETTINGS) as attributor:
            return [
                await answer_attribute(attributor, (photos / row["name"]).read_bytes(), full_request, "x")
                for row in rows
            ]

    labelled = 0
    for row, answer in zip(rows, asyncio.run(answers()), strict=True):
        theirs, explanation = answer.model_dump(), answer.model_dump()["explanations"][0]
        for ours, prediction in zip(row["predictions"], theirs["predictions"], strict=True):
            assert ours == pytest.approx(prediction, abs=1e-5)
        ledger = {"target": explanation["target"], "logit": explanation["logit"], **explanation["ledger"]}
        assert ledger["edit"] == 0  # no edit
        assert row["ledger"].keys() == ledger.keys()
        for name, value in ledger.items():
            assert row["ledger"][name] == (value if name == "target" else pytest.approx(value, abs=1e-5)), name
        assert row["fidelity"] == pytest.approx(theirs["fidelity"], abs=1e-4)
        features = [
            {"layer": layer["layer"], **feature} for layer in explanation["layers"] for feature in layer["features"]
        ]
        features.sort(key=lambda feature: -abs(feature["contribution"]))
        assert [(f["layer"], f["index"]) for f in row["features"]] == [(f["layer"], f["index"]) for f in features[:4]]
        for ours, feature in zip(row["features"], features, strict=False):
            assert ours == {
                name: pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
                for name, value in feature.items()
            }
        labelled += sum(feature["label"] is not None for feature in row["features"])
    assert labelled


def test_ledgers_add_up(found, bundle):
    for row in found:
        ledger = row["ledger"]
        assert len(ledger["attention"]) == len(ledger["clt"]) == bundle.manifest.shape.layers
        rows = [ledger["prior"], *ledger["attention"], *ledger["clt"], ledger["bias"], ledger["error"]]
        assert sum(rows) + ledger["remainder"] == pytest.approx(ledger["logit"], abs=1e-9)
        assert abs(ledger["remainder"]) <= 1e-3
        best = row["predictions"][0]
        assert (ledger["target"], ledger["logit"]) == (best["label"], pytest.approx(best["logit"], abs=1e-4))
        contributions = [abs(feature["contribution"]) for feature in row["features"]]
        assert contributions == sorted(contributions, reverse=True)


def test_rows_are_numbered_in_the_order_of_the_inputs(found):
    names = [f"{number:02}.png" for number in range(6)] + [f"deep/er/{number:02}.png" for number in range(6, COUNT)]
    assert [(row["id"], row["name"]) for row in found] == list(enumerate(names))


def write_list(photos, folder, picture):
    (folder / "list.txt").write_text("\ufeff" + "\r\n".join(os.path.relpath(file, folder) for file in files(photos)))
    return folder / "list.txt", None


def write_parquet_of_bytes(photos, folder, picture):
    with duckdb.connect() as database:
        for number, group in enumerate((files(photos)[:3], files(photos)[3:])):
            database.execute("CREATE OR REPLACE TABLE photos (number INTEGER, photo BLOB)")
            for file in group:
                database.execute("INSERT INTO photos VALUES (0, ?)", [file.read_bytes()])
            database.table("photos").write_parquet(str(folder / f"x-{number:03}.parquet"))
    return folder / "x-{000..001}.parquet", None


def write_parquet_of_paths(photos, folder, picture):
    with duckdb.connect() as database:
        database.execute('CREATE TABLE photos ("a ""name""" VARCHAR)')
        for file in files(photos):
            database.execute("INSERT INTO photos VALUES (?)", [os.path.relpath(file, folder)])
        database.table("photos").write_parquet(str(folder / "x.parquet"))
    return folder / "x.parquet", 'a "name"'


def write_parquet_of_the_hub(photos, folder, picture):
    with duckdb.connect() as database:
        database.execute('CREATE TABLE photos (image STRUCT("bytes" BLOB, "path" VARCHAR), other BLOB)')
        for number, file in enumerate(files(photos)):
            content = None if number == 2 else file.read_bytes()  # a row with the path alone
            database.execute("INSERT INTO photos VALUES ({'bytes': ?, 'path': ?}, '')", [content, str(file)])
        database.table("photos").write_parquet(str(folder / "x.parquet"))
    return folder / "x.parquet", None


def write_shards(photos, folder, picture):
    (folder / "shards").mkdir()
    for shard, group in enumerate((files(photos)[:4], files(photos)[4:7], files(photos)[7:])):
        with tarfile.open(folder / "shards" / f"x-{shard:03}.tar", "w") as tar:
            for number, file in enumerate(group):
                for name, content in ((f"{number}.png", file.read_bytes()), (f"{number}.cls", b"3")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder / "shards" / "x-{000..002}.tar", None


def files(folder):
    """In the order of a bulk run."""
    return sorted(path for path in folder.rglob("*.png") if not path.parent.name.startswith("."))


@pytest.mark.parametrize(
    "write",
    [write_list, write_parquet_of_bytes, write_parquet_of_paths, write_parquet_of_the_hub, write_shards],
)
def test_every_kind_of_input(write, start, photos, found, tmp_path, picture):
    source, column = write(photos, tmp_path, picture)
    assert start(source, tmp_path / "out", column) == Summary(COUNT, 0)
    rows = read(tmp_path / "out")
    assert [{**row, "name": ""} for row in rows] == [{**row, "name": ""} for row in found]
    names = {
        write_list: [os.path.relpath(file, tmp_path) for file in files(photos)],
        write_shards: ["x-000.tar/0.png", "x-000.tar/1.png"],
        write_parquet_of_bytes: ["x-000.parquet#0", "x-000.parquet#1", "x-000.parquet#2", "x-001.parquet#0"],
    }.get(write, ["x.parquet#0"])
    assert [row["name"] for row in rows][: len(names)] == names


def test_a_source_is_the_same_list_from_any_place(photos, tmp_path, picture):
    for write in (write_list, write_parquet_of_bytes, write_shards):
        folder = tmp_path / write.__name__
        folder.mkdir()
        source = open_inputs(str(write(photos, folder, picture)[0]))
        whole = [(item.id, item.name, item.read()) for item in source.reader().items(0, COUNT)]
        assert [content for _, _, content in whole] == [file.read_bytes() for file in files(photos)]
        for start, stop in ((0, 3), (2, 5), (3, 9), (7, COUNT), (9, COUNT + 5)):
            assert [(item.id, item.name, item.read()) for item in source.reader().items(start, stop)] == whole[
                start:stop
            ]


def test_broken_images_are_in_the_errors_table(start, photos, picture, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    contents = {
        "0.png": picture(seed=0),
        "1-empty.png": b"",
        "2-damaged.png": picture(seed=0)[:200],
        "3-text.jpg": b"these are no pixels",
        "4-large.png": picture(size=(300, 300)),
        "5.png": picture(seed=1),
        "6-\udcff.png": b"",  # a name that is not UTF-8
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "7-gone.png").symlink_to(folder / "nowhere")
    settings = Settings(batch_size=4, max_image_pixels=50_000)
    assert start(folder, tmp_path / "out", settings=settings, part_size=3) == Summary(2, 6)
    assert [(row["id"], row["name"]) for row in read(tmp_path / "out")] == [(0, "0.png"), (5, "5.png")]
    problems = read(tmp_path / "out" / "_errors")
    assert [(row["id"], row["name"], row["code"]) for row in problems] == [
        (1, "1-empty.png", "invalid_image"),
        (2, "2-damaged.png", "invalid_image"),
        (3, "3-text.jpg", "unsupported_image"),
        (4, "4-large.png", "image_too_large"),
        (6, r"6-\xff.png", "invalid_image"),
        (7, "7-gone.png", "unreadable"),
    ]
    assert problems[0]["message"] == "the image is empty (0 bytes)"
    assert problems[-1]["message"] == "the file cannot be read: No such file or directory"


def test_a_part_of_broken_images_alone_is_done_too(start, tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("a.png\nb.png\n")
    assert start(tmp_path / "list.txt", tmp_path / "out") == Summary(0, 2)
    monkeypatch.setattr(run, "Worker", None)  # nothing is loaded when all is done
    assert start(tmp_path / "list.txt", tmp_path / "out") == Summary(0, 2)


def test_rows_without_an_image(start, tmp_path):
    with duckdb.connect() as database:
        database.execute("CREATE TABLE photos AS SELECT NULL::BLOB AS image")
        database.table("photos").write_parquet(str(tmp_path / "x.parquet"))
    assert start(tmp_path / "x.parquet", tmp_path / "out") == Summary(0, 1)
    assert read(tmp_path / "out" / "_errors")[0]["code"] == "missing_image"


def test_what_cannot_be_read(photos, tmp_path):
    def refused(source, message, column=None):
        with pytest.raises(InputError, match=message):
            open_inputs(str(source), column)

    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "has no images")
    refused(photos, "--column can only be used with Parquet files", "image")
    (tmp_path / "x-0.tar").write_bytes(b"no tar at all" * 200)
    refused(
        tmp_path / "x-{0..1}.tar",
        r"x-0\.tar is not a readable tar file: it is not a tar file\. Write or download it again",
    )
    refused(tmp_path / "x-0.tar", "is not a readable tar file")
    shard = write_shards(photos, tmp_path, None)[0].parent / "x-000.tar"
    shard.write_bytes(shard.read_bytes()[: 512 * 4])
    refused(shard, "is not a readable tar file: it is cut short in the member that begins at byte")
    refused(shard.with_name("x-{009..010}.tar"), r"x-009\.tar is not a readable tar file: No such file or directory")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    refused(tmp_path / "x.parquet", "is not a readable Parquet file")
    with duckdb.connect() as database:
        database.sql("SELECT 1 AS number, ''::BLOB AS a, ''::BLOB AS b").write_parquet(str(tmp_path / "x.parquet"))
    refused(
        tmp_path / "x.parquet",
        r"it is not clear which column has the images\. .* the columns are number \(INTEGER\), a \(BLOB\)",
    )
    refused(tmp_path / "x.parquet", "there is no column 'c'", "c")
    refused(tmp_path / "x.parquet", "column 'number' is INTEGER, neither bytes nor paths", "number")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "list.txt", "is not a list")


def test_a_resume_with_other_options_is_refused(start, photos, found, tmp_path, carded):
    out = tmp_path / "out"
    start(photos, out)

    def refused(message, source=photos, **options):
        with pytest.raises(BulkError, match=message):
            start(source, out, **options)

    refused(r"started with other options: labels was red circle, .* and is now cat, dog\. Give", labels=["cat", "dog"])
    refused(r"templates was a photo of a \{\}, a drawing of one \{\} and is now my \{\}", templates=["my {}"])
    refused("top_k was 5 and is now 2", top_k=2)
    refused("features was 5 and is now 7", explain={"features": 7})
    refused("part_size was 4 and is now 5", part_size=5)
    refused("max_image_side was 16384 and is now 99", settings=Settings(max_image_side=99))
    refused("bundle was sha256:", bundle=carded)
    (photos / "new.png").write_bytes(b"")
    try:
        refused(r"inputs\.images was 10 and is now 11; inputs\.digest was")
    finally:
        (photos / "new.png").unlink()
    (tmp_path / "list.txt").write_text("\n".join(map(str, files(photos))))
    refused(r"inputs\.kind was folder and is now list; inputs\.path was", source=tmp_path / "list.txt")
    # These settings do not affect answers.
    assert start(photos, out, settings=Settings(batch_size=3, decode_threads=1)) == Summary(COUNT, 0)
    assert read(out) == found


def test_label_sets_by_name(start, photos, tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "pets.json").write_text('{"labels": ["cat", "dog"], "templates": ["my {}"]}')
    settings = Settings(label_sets=tmp_path / "sets")
    start(photos, tmp_path / "out", settings=settings, label_set="pets")
    job = Job.model_validate_json((tmp_path / "out" / "_job.json").read_bytes())
    assert (job.labels, job.templates) == (("cat", "dog"), ("my {}",))
    assert {row["ledger"]["target"] for row in read(tmp_path / "out")} <= {"cat", "dog"}
    with pytest.raises(ServiceError, match="there is no label set 'birds'; the label sets are: default, pets"):
        start(photos, tmp_path / "other", settings=settings, label_set="birds")
    with pytest.raises(ServiceError, match="labels and a label set cannot be used together"):
        start(photos, tmp_path / "other", labels=["cat"], label_set="pets")


def test_output_that_is_something_else(start, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letters.txt").write_text("mine")
    with pytest.raises(BulkError, match=r"is not empty and has no _job\.json"):
        start(photos, tmp_path / "out")
    with pytest.raises(BulkError, match="is in the input folder"):
        start(photos, photos / "out")
    with pytest.raises(FileError, match=r"letters\.txt cannot be written"):
        start(photos, tmp_path / "out" / "letters.txt")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "_job.json").write_text("{}")
    with pytest.raises(BulkError, match="is not from this version"):
        start(photos, tmp_path / "old")


def test_two_runs_do_not_share_an_output(start, bundle, photos, tmp_path):
    source = open_inputs(str(photos))
    job = make_job(bundle, SETTINGS, source, AttributeRequest(), path=str(photos), part_size=4)
    with lock_output(tmp_path / "out", job), pytest.raises(BulkError, match="another run is writing to"):
        start(photos, tmp_path / "out")
    assert start(photos, tmp_path / "out") == Summary(COUNT, 0)


def test_batches_are_full_and_memory_is_bounded(start, photos, tmp_path, monkeypatch):
    """An image is not read before its turn comes, and broken ones leave no holes in batches."""
    sizes, ahead, read_so_far = [], [], 0
    explain, read_file = work.Engine.explain, sources.read_file

    def count_read(path):
        nonlocal read_so_far
        read_so_far += path.endswith(".png")
        return read_file(path)

    def record(engine, pixels, *more):
        sizes.append(len(pixels))
        ahead.append(read_so_far - sum(sizes[2:]))
        return explain(engine, pixels, *more)

    monkeypatch.setattr(work.Engine, "explain", record)
    monkeypatch.setattr(work.Engine, "warm_up", lambda _: None)
    monkeypatch.setattr(sources, "read_file", count_read)
    monkeypatch.setattr(work, "AHEAD", 1)
    listed = [str(file) for file in files(photos)] * 8
    listed.insert(3, "gone")  # in the middle of a batch
    (tmp_path / "list.txt").write_text("\n".join(listed))
    assert start(tmp_path / "list.txt", tmp_path / "out", settings=Settings(batch_size=2), part_size=81) == (80, 1)
    assert sizes == [2] * 40
    assert max(ahead) <= 2 * 2 + 2 + 2  # one batch ahead, one in progress, one being collected


def test_progress_shows_what_is_done_and_broken(start, photos, tmp_path):
    text = io.StringIO()
    (tmp_path / "list.txt").write_text("\n".join(["gone", *map(str, files(photos))]))
    start(tmp_path / "list.txt", tmp_path / "out", console=Console(file=text, width=200, force_terminal=True))
    assert "11/11" in text.getvalue()
    assert "images/s" in text.getvalue()
    assert "1 broken" in text.getvalue()


def test_missing_ray_is_named(start, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "vitrine.service.offline.bulk.ray_engine", raising=False)
    with pytest.raises(BulkError, match=r"--ray requires Ray: pip install 'vitrine\[bulk\]'"):
        start(photos, tmp_path / "out", ray_workers=2)


# A run in a separate process: python -c CODE bundle inputs out dies_at ray_workers. With dies_at = n it kills itself,
# as kill -9 would, at the n-th step of writing: every write, flush and rename of a file is one.
CODE = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.files import writing
from vitrine.service.offline.bulk import tables
from vitrine.models.inputs.opening import open_inputs
from vitrine.service.offline.bulk.job import make_job
from vitrine.service.offline.bulk.work import Work
from vitrine.service.offline.bulk.run import bulk
from vitrine.service.schemas.attribute import AttributeRequest
from vitrine.service.operations.settings import Settings

bundle, inputs, out, dies_at, ray_workers = sys.argv[1:]
left = int(dies_at)

def dying(function):
    def step(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return step

settings, source, opened = Settings(batch_size=4), open_inputs(inputs), open_bundle(Path(bundle))
job = make_job(opened, settings, source, AttributeRequest(), path=inputs, part_size=8)
if left:
    writing.flush, tables._write = dying(writing.flush), dying(tables._write)
    os.link, os.replace = dying(os.link), dying(os.replace)
print(*bulk(opened, Work(job, source, Path(out), settings), Console(quiet=True), int(ray_workers)))
"""


@pytest.fixture(scope="module")
def many(picture, tmp_path_factory):
    """A folder of 300 tiny files, every 25th broken."""
    folder = tmp_path_factory.mktemp("many")
    pictures = [picture(seed=seed) for seed in range(5)]
    for number in range(300):
        (folder / f"{number:03}.png").write_bytes(b"broken" if number % 25 == 3 else pictures[number % 5])
    return folder


def check_complete(out):
    """Assert that every image of `many` is there once, in the right table."""
    rows, problems = read(out), read(out / "_errors")
    assert [row["id"] for row in rows] == [number for number in range(300) if number % 25 != 3]
    assert [row["id"] for row in problems] == [number for number in range(300) if number % 25 == 3]
    assert all(row["name"] == f"{row['id']:03}.png" for row in rows + problems)
    remaining = [path for path in out.rglob("*") if path.is_file() and path.name not in (".lock", "_job.json")]
    assert all(path.name.startswith("part-") for path in remaining), "half written files are left"


def test_kill_at_any_moment_loses_nothing_and_does_nothing_twice(bundle_path, many, tmp_path, light_python):
    out = tmp_path / "out"
    command = [light_python, "-c", CODE, bundle_path, many, out, "0", "0"]
    written, kills = set(), 0
    for parts in (3, 12, 22):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None and len(list(out.glob("part-*"))) < parts:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        stamps = {(path.name, path.stat().st_mtime_ns) for path in out.glob("part-*")}
        assert parts <= len(stamps) < 38
        assert written <= stamps, "a part that was done was done again"
        written = stamps
    assert kills == 3
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["288", "12"]
    assert written <= {(path.name, path.stat().st_mtime_ns) for path in out.glob("part-*")}
    check_complete(out)


@pytest.mark.parametrize("dies_at", [2, 5, 8, 10, 11])
def test_kill_between_any_two_steps_of_writing(dies_at, bundle_path, many, tmp_path, light_python, start):
    """The first part has a broken image: _job.json, its errors and its rows are written in 3, 4 and 4 steps."""
    out = tmp_path / "out"
    command = [light_python, "-c", CODE, bundle_path, many, out, str(dies_at), "0"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert len(list(out.glob("part-*"))) == (dies_at == 11)
    summary = start(many, out, part_size=8)
    assert summary == Summary(288, 12)
    check_complete(out)


def test_an_image_that_was_fixed_between_two_runs_is_no_longer_an_error(start, picture, tmp_path, monkeypatch):
    folder, out, write = tmp_path / "photos", tmp_path / "out", tables._write
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")

    def dying(file, *more):
        if file.parent == out:
            raise KeyboardInterrupt
        write(file, *more)

    monkeypatch.setattr(tables, "_write", dying)
    with pytest.raises(KeyboardInterrupt):
        start(folder, out)
    assert (len(read(out / "_errors")), read(out)) == (1, [])
    monkeypatch.undo()
    (folder / "a.png").write_bytes(picture())
    assert start(folder, out) == Summary(1, 0)
    assert read(out / "_errors") == []


def test_paths_never_touch_the_data(start, photos, found, tmp_path):
    """By default DuckDB would take `name=b32` for a column, and `[1]` for a glob."""
    out = tmp_path / "name=b32" / "id=3" / "[1] *?"
    assert start(photos, out) == Summary(COUNT, 0)
    with duckdb.connect() as database:
        for part in sorted(out.glob("part-*.parquet")):
            shutil.copy(part, tmp_path / part.name)
        names = database.sql(f"SELECT id, name FROM '{tmp_path}/part-*.parquet' ORDER BY id").fetchall()
    assert names == [(row["id"], row["name"]) for row in found]
    assert start(photos, out) == Summary(COUNT, 0)


def test_inputs_may_have_any_name(start, photos, found, tmp_path):
    strange = tmp_path / os.fsdecode(b"\xff[1]")
    shutil.copytree(photos, strange)
    assert start(strange, tmp_path / "out") == Summary(COUNT, 0)
    assert read(tmp_path / "out") == found
    with pytest.raises(BulkError, match="is in the input folder"):
        start(strange, strange / "out")


def test_a_folder_begun_by_another_version_is_refused(start, photos, tmp_path):
    start(photos, tmp_path / "out")
    job = json.loads((tmp_path / "out" / "_job.json").read_text())
    del job["format"]
    (tmp_path / "out" / "_job.json").write_text(json.dumps(job))
    with pytest.raises(BulkError, match="was started by another version of Vitrine, which numbered images differently"):
        start(photos, tmp_path / "out")


def test_a_folder_keeps_the_columns_that_it_was_begun_with(start, photos, found, tmp_path):
    """Parts of one folder have the same columns, whichever version wrote them."""
    out = tmp_path / "out"
    start(photos, out)
    job = json.loads((out / "_job.json").read_text())
    assert job.pop("columns") == 2
    (out / "_job.json").write_text(json.dumps(job))
    for part in out.glob("part-*.parquet"):
        part.unlink()
    assert start(photos, out) == Summary(COUNT, 0)
    for row, now in zip(read(out), found, strict=True):
        assert {**now["ledger"], "mlp": 0, "edit": 0} == {**row["ledger"], "mlp": 0, "edit": 0}
        assert "mlp" not in row["ledger"]
        assert "edit" not in row["ledger"]
        assert [set(one) for one in row["predictions"]] == [{"label", "probability", "logit"}] * len(row["predictions"])
    job["columns"] = 3
    (out / "_job.json").write_text(json.dumps(job))
    with pytest.raises(BulkError, match="columns was 3 and is now 2"):
        start(photos, out)


@pytest.fixture(scope="module")
def with_errors(start, photos, tmp_path_factory):
    """Output of `photos` and of a file that is no image, the last one."""
    folder = tmp_path_factory.mktemp("with-errors")
    shutil.copytree(photos, folder / "photos")
    (folder / "photos" / "x.png").write_bytes(b"none")
    assert start(folder / "photos", folder / "out") == Summary(COUNT, 1)
    return folder / "out"


READERS = {
    "pandas": lambda out: pandas.read_parquet(out).id.tolist(),
    "pyarrow": lambda out: dataset.dataset(out).to_table()["id"].to_pylist(),
    "polars": lambda out: polars.read_parquet(out / "*.parquet")["id"].to_list(),
    "duckdb": lambda out: [row[0] for row in duckdb.sql(f"SELECT id FROM '{out}/*.parquet'").fetchall()],
}


@pytest.mark.parametrize("reader", READERS)
def test_others_read_the_folder_as_one_table(with_errors, reader):
    """Whatever stands beside the parts: the job, the errors, the lock."""
    assert {path.name for path in with_errors.iterdir()} > {".lock", "_job.json", "_errors"}
    assert sorted(READERS[reader](with_errors)) == [*range(COUNT)]


def test_a_folder_begun_with_the_names_of_before_is_taken_up(start, photos, tmp_path):
    out, broken = tmp_path / "out", tmp_path / "broken"
    shutil.copytree(photos, broken)
    (broken / "x.png").write_bytes(b"none")
    start(broken, out)
    rows, problems = read(out), read(out / "_errors")
    (out / "_job.json").rename(out / "job.json")
    (out / "_errors").rename(out / "errors")
    (out / "part-000001.parquet").unlink()
    with pytest.raises(BulkError, match=rf"^{out} was started with other options: top_k was 5 and is now 3"):
        start(broken, out, top_k=3)
    assert (out / "job.json").exists()
    assert start(broken, out) == Summary(COUNT, 1)
    assert (read(out), read(out / "_errors")) == (rows, problems)
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".parquet") == [".lock", "_errors", "_job.json"]


def test_the_rows_of_an_edited_ledger_add_up(start, photos, bundle, tmp_path):
    """With what the edit wrote, which is a row of its own."""
    width, last = bundle.manifest.shape.width, bundle.manifest.shape.layers - 1
    vector = {
        "op": "project",
        "layer": last,
        "vector": [(-1.0) ** n for n in range(width)],
        "value": 3,
        "tokens": "cls",
    }
    edits, out = tmp_path / "edits", tmp_path / "out"
    edits.mkdir()
    edit = create("zigzag", "a test", (Intervention(**vector),), "direct", graphs_digest(bundle.manifest))
    (edits / "zigzag.json").write_text(edit.text())
    start(photos, out, settings=SETTINGS.model_copy(update={"edits": edits}), edit="zigzag")
    for row in read(out):
        ledger = row["ledger"]
        assert row["edited"]
        assert abs(ledger["edit"]) > 1e-2
        single = sum(ledger[name] for name in ("prior", "bias", "error", "edit", "remainder"))
        assert single + sum(ledger["attention"]) + sum(ledger["clt"]) == pytest.approx(ledger["logit"], abs=1e-4)


def test_compressed_tars_are_read_in_one_pass_over_all_parts(start, photos, found, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        for file in files(photos):
            tar.add(file, file.name)
    opened, open_stream = [], shards.open_stream
    monkeypatch.setattr(shards, "open_stream", lambda path: opened.append(path) or open_stream(path))
    assert start(tmp_path / "x.tgz", tmp_path / "out", part_size=3) == Summary(COUNT, 0)
    assert [{**row, "name": ""} for row in read(tmp_path / "out")] == [{**row, "name": ""} for row in found]
    assert len(opened) == 1


def test_job_is_readable(start, photos, tmp_path, bundle):
    start(photos, tmp_path / "out")
    job = json.loads((tmp_path / "out" / "_job.json").read_text())
    assert job["bundle"] == bundle.digest
    assert job["inputs"]["images"] == COUNT
    assert job["inputs"]["path"] == str(photos)


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_ray_writes_the_same(start, bundle_path, many, tmp_path):
    """Its processes resume what one process without Ray has begun. With sources, which are run by other graphs."""
    out, explain = tmp_path / "out", {"sources": True, "source_features": 2}
    start(many, tmp_path / "one", part_size=8, explain=explain)
    assert "AttributeRequest()" in CODE
    code = CODE.replace("AttributeRequest()", f"AttributeRequest(explain={explain})")
    command = [sys.executable, "-c", code, bundle_path, many, out]
    assert subprocess.run([*command, "11", "0"], capture_output=True).returncode == -signal.SIGKILL
    environment = {**os.environ, "HOME": str(tmp_path)}  # Ray stores files there
    finished = subprocess.run([*command, "0", "2"], capture_output=True, text=True, env=environment)
    assert finished.stdout.split() == ["288", "12"], finished.stderr
    check_complete(out)
    for row, expected in zip(read(out), read(tmp_path / "one"), strict=True):
        np.testing.assert_allclose(row["ledger"]["clt"], expected["ledger"]["clt"], rtol=0, atol=1e-5)
        ours, theirs = row["sources"]["features"], expected["sources"]["features"]
        assert [(f["layer"], f["index"]) for f in ours] == [(f["layer"], f["index"]) for f in theirs]
    assert read(out / "_errors") == read(tmp_path / "one" / "_errors")


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_more_than_ray_has_is_refused_and_not_waited_for(photos, tmp_path, bundle_path):
    argument = "Work(job, source, Path(out), settings)"
    assert argument in CODE
    code = CODE.replace(argument, argument.replace("settings", "settings.model_copy(update={'provider': 'cuda'})"))
    command = [sys.executable, "-c", code, bundle_path, photos, tmp_path / "out", "0", "9"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert finished.returncode == 1
    assert "BulkError: --ray 9 needs 9 GPUs, but Ray has" in finished.stderr
