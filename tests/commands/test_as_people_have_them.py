"""Inputs as people have them, by the commands: each of these was silently wrong, missing or refused in a released
version (5dbfd69). What each room does about it is tested there; here is what a user gets.

Needs nothing but the packages: `pytest --noconftest` runs it against another checkout, which PYTHONPATH names.
"""

import io
import json
import os
import struct
import tarfile
import zlib

import duckdb
import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

try:
    from vitrine.commands import app
    from vitrine.training.data.sources import open_images
    from vitrine.training.recipes.image_sources import FolderSource, WebDatasetSource
except ModuleNotFoundError:  # 5dbfd69
    from training.sources import open_images

    from training.recipes import FolderSource, WebDatasetSource
    from vitrine import app


def photo(side=64):
    y, x = np.mgrid[0:side, 0:side] / side
    levels = np.stack([x, y, (x + y) / 2], -1) * 200 + np.random.default_rng(0).integers(0, 55, (side, side, 3))
    return Image.fromarray(levels.astype(np.uint8))


def encoded(image=None, format="JPEG", **options):
    file = io.BytesIO()
    (image or photo()).save(file, format, **options)
    return file.getvalue()


def run(*arguments, exits=0):
    """What a command printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exits, result.output
    return result.output


def tables(out):
    """(rows, errors) of a bulk run, read from memory, so that no folder's name touches what is read."""
    found = []
    for folder in (out, next(iter(out.glob("*errors")), out / "none")):
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        parts = [file.read_bytes() for file in files if file.suffix == ".parquet"]
        found.append([row for part in parts for row in parquet.read_table(io.BytesIO(part)).to_pylist()])
    return found


def bulk(inputs, tmp_path, *options, out="answers", exits=0):
    """(names of the rows, of the errors, what was printed) of `vitrine bulk`."""
    printed = run("bulk", inputs, "--out", tmp_path / out, *options, exits=exits)
    rows, errors = ([row["name"] for row in table] for table in tables(tmp_path / out))
    return rows, errors, " ".join(printed.split())


def predict(path, *options, exits=0):
    output = run("attribute", path, "--json", *options, exits=exits)
    return output if exits else json.loads(output[output.index("{") :])


def trained(tmp_path, *files):
    """Mean level, by channel, of the images as training reads them; files: (name, content)."""
    (tmp_path / "train" / "things").mkdir(parents=True, exist_ok=True)
    for name, content in files:
        (tmp_path / "train" / "things" / name).write_bytes(content)
    images = open_images(
        FolderSource(kind="folder", path="train"), tmp_path, lambda image: np.asarray(image).mean((0, 1))
    )
    return [images[index][0] for index in range(len(images))]


def tar(path, members, links=()):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return path


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# Images


def test_grey_of_sixteen_bits_is_grey_in_training_as_in_the_service(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    (mean,) = trained(tmp_path, ("grey.png", encoded(Image.fromarray(ramp), "PNG")))
    assert mean == pytest.approx(127.5, abs=1)


CLEAR = np.zeros((64, 64, 4), np.uint8)  # a red square on nothing; what lies under "nothing" is black
CLEAR[16:48, 16:48] = (200, 30, 30, 255)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Name of an image -> its row, for those that were answered."""
    folder = tmp_path_factory.mktemp("images")
    on_white = Image.new("RGB", (64, 64), "white")
    on_white.paste((200, 30, 30), (16, 16, 48, 48))
    whole, png = encoded(), encoded(format="PNG")
    profile = chunk(b"iCCP", b"scanner\0\0" + zlib.compress(bytes(2_000_000)))
    for name, data in {
        "clear.png": encoded(Image.fromarray(CLEAR), "PNG"),
        "white.png": encoded(on_white, "PNG"),
        "whole.jpg": whole,
        "no-end.jpg": whole[:-2],
        "cut.jpg": whole[: len(whole) // 2],
        "plain.png": png,
        "huge-profile.png": png[:33] + profile + png[33:],
        "phone.jpg": encoded(Image.new("RGB", (8064, 6048), (90, 120, 60)), quality=60),
    }.items():
        (folder / name).write_bytes(data)
    run("bulk", folder, "--out", folder.parent / "answers-to-images")
    return {row["name"]: row for row in tables(folder.parent / "answers-to-images")[0]}


def test_what_is_transparent_is_white(answered, tmp_path):
    (mean,) = trained(tmp_path, ("clear.png", encoded(Image.fromarray(CLEAR), "PNG")))
    assert mean == pytest.approx([241.25, 198.75, 198.75])
    assert answered["clear.png"]["predictions"] == answered["white.png"]["predictions"]
    assert answered["clear.png"]["warnings"] == ["image_transparent"]
    assert not answered["white.png"]["warnings"]


def test_a_jpeg_without_its_end_is_read_and_one_cut_short_is_not(answered):
    assert answered["no-end.jpg"]["predictions"] == answered["whole.jpg"]["predictions"]
    assert answered["no-end.jpg"]["warnings"] == ["image_without_end"]
    assert "cut.jpg" not in answered


def test_a_huge_profile_does_not_decide(answered):
    assert answered["huge-profile.png"]["predictions"] == answered["plain.png"]["predictions"]


def test_a_photo_of_48_million_pixels_is_answered(answered):
    assert answered["phone.jpg"]["warnings"] == ["image_reduced"]


# Folders, tars, Parquet files


def test_folders_with_links_and_litter(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for place in (folder / "@eaDir", elsewhere):
        place.mkdir(parents=True)
    for path in (folder / "a.jpg", folder / "b.JPG", folder / "c.jpeg", elsewhere / "linked.jpg"):
        path.write_bytes(encoded())
    (folder / "link").symlink_to(elsewhere, target_is_directory=True)
    (folder / "again").symlink_to(folder, target_is_directory=True)
    for name in ("._a.jpg", "Thumbs.db", "@eaDir/a.jpg", "a.txt", "film.mp4"):
        (folder / name).write_bytes(b"\0\5\26\7 no image")
    rows, errors, printed = bulk(folder, tmp_path)
    assert rows == ["a.jpg", "b.JPG", "c.jpeg", "link/linked.jpg"]
    assert not errors
    assert "film.mp4" in printed
    assert "Thumbs.db" in printed


TARS = {
    "links": lambda path: tar(
        path, [("1.jpg", encoded())], [("2.jpg", "1.jpg", tarfile.LNKTYPE), ("3.jpg", "1.jpg", tarfile.SYMTYPE)]
    ),
    "litter": lambda path: tar(
        path, [("1.jpg", encoded()), ("._1.jpg", b"\0\5\26\7"), ("__MACOSX/._1.jpg", b"\0\5\26\7")]
    ),
    "no end": lambda path: path.write_bytes(tar(path, [("1.jpg", encoded())]).read_bytes().rstrip(b"\0")),
    "concatenated": lambda path: path.write_bytes(
        tar(path, [("1.jpg", encoded())]).read_bytes() + tar(path, [("2.jpg", encoded())]).read_bytes()
    ),
    "compressed": lambda path: path.write_bytes(
        __import__("gzip").compress(tar(path, [("1.jpg", encoded())]).read_bytes())
    ),
}


@pytest.mark.parametrize(
    ("case", "name", "rows"),
    [
        ("links", "x.tar", 3),
        ("litter", "x.tar", 1),
        ("no end", "x.tar", 1),
        ("concatenated", "x.tar", 2),
        ("compressed", "x.tar.gz", 1),
        ("litter", "X.TAR", 1),
    ],
)
def test_tars(tmp_path, case, name, rows):
    TARS[case](tmp_path / name)
    answered, errors, _ = bulk(tmp_path / name, tmp_path)
    assert (len(answered), errors) == (rows, [])


def test_samples_with_compound_extensions_are_found_by_bulk_and_training(tmp_path):
    members = [("a.input.jpg", encoded()), ("a.cls", b"0"), ("b.main.jpg", encoded()), ("b.cls", b"1")]
    tar(tmp_path / "x.tar", members)
    rows, _, _ = bulk(tmp_path / "x.tar", tmp_path)
    assert len(rows) == 2
    images = open_images(WebDatasetSource(kind="webdataset", shards="x.tar"), tmp_path, np.asarray)
    assert [images[index][1] for index in range(len(images))] == [0, 1]


def test_captions_are_no_classes(tmp_path):
    captions = [(f"{n}.{kind}", data) for n in range(4) for kind, data in (("jpg", encoded()), ("txt", b"no %d" % n))]
    tar(tmp_path / "x.tar", captions)
    images = open_images(WebDatasetSource(kind="webdataset", shards="x.tar"), tmp_path, np.asarray)
    assert (len(images), tuple(images.classes)) == (4, ())


@pytest.mark.parametrize("pattern", ["folder", "folder/*.tar", "folder/*.parquet"])
def test_a_folder_or_a_pattern_of_tars_or_of_parquet_files(tmp_path, pattern):
    (tmp_path / "folder").mkdir()
    for number in range(2):
        if pattern.endswith("parquet"):
            table = duckdb.sql("SELECT ?::BLOB AS image", params=[encoded()])
            table.write_parquet(str(tmp_path / f"folder/{number}.parquet"))
        else:
            tar(tmp_path / f"folder/{number}.tar", [("1.jpg", encoded())])
    rows, errors, _ = bulk(f"{tmp_path}/{pattern}", tmp_path)
    assert (len(rows), errors) == (2, [])


def test_nothing_answered_is_no_success(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jpg").write_bytes(b"no image")
    rows, errors, printed = bulk(tmp_path / "folder", tmp_path, exits=1)
    assert (rows, errors) == ([], ["a.jpg"])
    assert "no image" in printed


@pytest.mark.parametrize("out", ["runs/name=b32", "runs/id=3/x", "answers [2024]", "a?b*"])
def test_no_path_touches_the_data(tmp_path, out):
    folder = tmp_path / "image=1 [a]"
    folder.mkdir()
    duckdb.sql("SELECT ?::BLOB AS image", params=[encoded()]).write_parquet(str(folder / "x.parquet"))
    rows, errors, printed = bulk(folder / "x.parquet", tmp_path, out=out)
    assert (rows, errors) == (["x.parquet#0"], [])
    assert "1 row" in printed


def test_a_damaged_shard_ends_the_run_unless_it_may_be_skipped(tmp_path):
    for number in range(3):
        tar(tmp_path / f"x-{number}.tar", [("1.jpg", encoded())])
    (tmp_path / "x-1.tar").write_bytes((tmp_path / "x-1.tar").read_bytes()[:900])
    bulk(f"{tmp_path}/x-{{0..3}}.tar", tmp_path, exits=1)
    rows, errors, printed = bulk(f"{tmp_path}/x-{{0..3}}.tar", tmp_path, "--skip-broken-shards")
    assert (rows, errors) == (["x-0.tar/1.jpg", "x-2.tar/1.jpg"], [])
    assert "x-1.tar" in printed
    assert "x-3.tar" in printed


# Labels


def test_labels_that_the_clip_cannot_tell_apart_are_named(tmp_path):
    same = [["Cat", "cat", "ＣＡＴ"], ["Ben &amp; Jerry", "Ben & Jerry"], ["schÃ¶n", "schön"]]
    cut = ["very " * 40 + "cat", "very " * 40 + "dog"]
    labels = ",".join(["dog", *(label for group in [*same, cut] for label in group)])
    (tmp_path / "a.jpg").write_bytes(encoded())
    named = [
        (warning["code"], warning["labels"]) for warning in predict(tmp_path / "a.jpg", "--labels", labels)["warnings"]
    ]
    assert sorted(named) == sorted([("labels_cut", cut), *(("labels_same", group) for group in [*same, cut])])
    predict(tmp_path / "a.jpg", "--labels", labels, "--strict", exits=1)


# File systems


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    import errno
    import fcntl

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jpg").write_bytes(encoded())
    rows, errors, printed = bulk(tmp_path / "folder", tmp_path)
    assert (rows, errors) == (["a.jpg"], [])
    assert "lock" in printed
