"""What a command line names: every kind, mixtures, patterns, lists; and that every entry is accounted for."""

import os
import shutil
from pathlib import Path

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import JPEG, PNG, names_and_contents, tar_bytes

from vitrine.models.inputs.classes import by_class
from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.opening import open_inputs
from vitrine.models.inputs.pattern import expand_braces, find
from vitrine.models.inputs.skipped import Reason, Skipped


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("x-{3..1}.tar", ["x-3.tar", "x-2.tar", "x-1.tar"]),
        ("plain.tar", ["plain.tar"]),
        ("{a", ["{a"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, expected):
    assert expand_braces(pattern) == expected


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with images at three depths, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.jpg", "a.jpg", "d/a.jpg", "d/e/c.png", "d/.hidden.jpg", ".git/x.jpg", "[x]/a.jpg", "{y}.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(JPEG)
    Path("d/up").symlink_to(tmp_path / "d")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg", "b.jpg", "{y}.jpg"]),
        ("[ab].jpg", ["a.jpg", "b.jpg"]),
        ("{b,a,b}.jpg", ["b.jpg", "a.jpg"]),
        ("?/*.jpg", ["d/a.jpg"]),
        ("**/*.png", ["d/e/c.png"]),
        ("**/a.jpg", ["[x]/a.jpg", "a.jpg", "d/a.jpg"]),
        ("d/**", ["d/a.jpg", "d/e/c.png"]),
        ("d/**/e/*", ["d/e/c.png"]),
        ("[x]/*.jpg", ["[x]/*.jpg"]),
        ("[x]", ["[x]"]),
        ("{y}.jpg", ["{y}.jpg"]),
        ("x{0..1}*", ["x0*", "x1*"]),
    ],
)
def test_patterns(here, pattern, expected):
    """What exists is meant literally; `**` passes over hidden names and goes round no loop."""
    found = [str(path) for path in find(pattern, Skipped())]
    assert found == expected
    assert [str(path) for path in find(pattern, Skipped(), here)] == [str(here / name) for name in found]
    assert [str(path) for path in find(f"{here}/{pattern}", Skipped())] == [str(here / name) for name in found]


def write_tables(folder):
    folder.mkdir(exist_ok=True)
    (folder / "x.tar").write_bytes(tar_bytes(("1.jpg", JPEG)))
    with duckdb.connect() as database:
        database.sql("SELECT 'p'::BLOB AS image").write_parquet(str(folder / "x.parquet"))
    shutil.copy(folder / "x.parquet", folder / "Y.PARQUET")
    shutil.copy(folder / "x.tar", folder / "Y.TAR")
    (folder / "readme.md").touch()


def test_kinds_by_name_and_by_first_bytes(here):
    write_tables(here / "t")
    os.rename("t/x.tar", "t/one")
    os.rename("t/x.parquet", "t/two")
    for name, kind, count in (
        ("a.jpg", "files", 1),
        ("*.jpg", "files", 3),
        ("d", "folder", 2),
        ("{a.jpg,d/e}", "files", 2),
        ("t/one", "shards", 1),
        ("t/Y.TAR", "shards", 1),
        ("t/two", "parquet", 1),
        ("t/Y.PARQUET", "parquet", 1),
        ("t/{one,Y.TAR}", "shards", 2),
    ):
        source = open_inputs(name)
        assert (name, source.kind, len(source)) == (name, kind, count)
        assert all(isinstance(content, bytes) for _, content in names_and_contents(source))
    assert [name for name, _ in names_and_contents(open_inputs("{a.jpg,d/e}"))] == ["a.jpg", "d/e/c.png"]


def test_mixtures_are_taken_by_a_rule_or_refused(tmp_path):
    write_tables(tmp_path)
    with pytest.raises(InputError, match=r"has no images but both tar and Parquet files, Y.TAR and Y.PARQUET; choose"):
        open_inputs(str(tmp_path))
    with pytest.raises(
        InputError, match=r"matches files of several kinds, .*Y\.PARQUET and .*Y\.TAR; give files of one kind"
    ):
        open_inputs(str(tmp_path / "*"))
    source = open_inputs(str(tmp_path / "*.[tT]*"))
    assert (source.kind, len(source), source.skipped.total()) == ("shards", 2, 0)
    for name in ("x.tar", "Y.TAR"):
        (tmp_path / name).unlink()
    source = open_inputs(str(tmp_path))
    assert (source.kind, len(source), source.skipped.names) == ("parquet", 2, {Reason.OTHER: ["readme.md"]})
    (tmp_path / "a.jpg").write_bytes(JPEG)
    source = open_inputs(str(tmp_path))
    assert (source.kind, len(source)) == ("folder", 1)
    assert source.skipped.names[Reason.BESIDE] == ["Y.PARQUET", "x.parquet"]


def test_what_is_refused(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "x.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("x.zip", r"it is a zip archive, which is not supported\. Unpack it into a folder"),
        ("x.tar.zst", r"it is compressed by zstd, which is not supported\. Decompress it"),
        ("pipe", "cannot be read: it is a named pipe"),
        ("*.jpg", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            open_inputs(str(tmp_path / name))
    (tmp_path / "x.tar.zst").unlink()
    with pytest.raises(
        InputError, match=r"no images\. left out, not regular files: 1 \(pipe\)\. left out, not images.*x\.zip"
    ):
        open_inputs(str(tmp_path))


def test_lists(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    strange = os.fsdecode(b"\xff \xe9.jpg")
    (tmp_path / strange).write_bytes(PNG)
    lines = [b"a.jpg", b"", b"  ", b"./a.jpg", os.fsencode(tmp_path / "a.jpg"), os.fsencode(strange)]
    (tmp_path / "list").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\n")
    source = open_inputs(str(tmp_path / "list"))
    assert source.kind == "list"
    assert names_and_contents(source) == [
        ("a.jpg", JPEG),
        ("./a.jpg", JPEG),
        (str(tmp_path / "a.jpg"), JPEG),
        (r"\xff \xe9.jpg", PNG),
    ]
    (tmp_path / "list").write_bytes(b"\x7fELF\0\0")
    with pytest.raises(InputError, match="is not a list, tar or Parquet file"):
        open_inputs(str(tmp_path / "list"))


def test_one_folder_a_class(tmp_path):
    for name in ("cat/1.jpg", "cat/deep/2.jpg", "ant/1.jpg", "beside.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(JPEG)
    for name in ("empty", ".git"):
        (tmp_path / name).mkdir()
    opened = open_inputs(str(tmp_path))
    classes, inside = by_class(opened)
    assert classes == ("ant", "cat")
    assert inside.paths == ["ant/1.jpg", "cat/1.jpg", "cat/deep/2.jpg"]
    assert inside.skipped.names == {
        Reason.LITTER: [".git"],
        Reason.NO_LABEL: ["beside.jpg"],
        Reason.EMPTY: ["empty"],
    }
    assert opened.skipped.total() == 1  # as it was
    flat = open_inputs(str(tmp_path / "ant"))
    assert by_class(flat) == ((), flat)


# Every entry is answered, failed or left out.

NAMES = ("a.jpg", "B.PNG", "bare", "LICENSE", "x.txt", "._a.jpg", "Thumbs.db", "frame.01", "broken.jpg", "t.tar")
FOLDERS = ("", "sub/", "sub/deep/", "@eaDir/", "__MACOSX/")
ENTRIES = st.dictionaries(
    st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)).map("".join),
    st.sampled_from([JPEG, PNG, b"text", b""]),
    max_size=12,
)


def accounted(source):
    """(read, failed): an image is what starts like one."""
    contents = [content for _, content in names_and_contents(source)]
    read = sum(isinstance(content, bytes) and content in (JPEG, PNG) for content in contents)
    return read, len(contents) - read


def entries_of(files):
    """Names that count: a folder of litter counts as one."""
    return {f"{name.split('/')[0]}" if name[0] in "@_" else name for name in files}


@given(ENTRIES, st.lists(st.sampled_from(["gone.jpg", "loop", "pipe.jpg"]), unique=True))
@settings(max_examples=40, deadline=None)
def test_every_entry_of_a_folder_is_accounted_for(tmp_path_factory, files, more):
    root = tmp_path_factory.mktemp("tree")
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    if "gone.jpg" in more:
        (root / "gone.jpg").symlink_to(root / "nowhere")
    if "loop" in more:
        (root / "loop").symlink_to(root)
    if "pipe.jpg" in more:
        os.mkfifo(root / "pipe.jpg")
    (root / "sure.jpg").write_bytes(JPEG)
    source = open_inputs(str(root))
    read, failed = accounted(source)
    assert read + failed + source.skipped.total() == len(entries_of(files)) + len(more) + 1
    images = sum(
        content in (JPEG, PNG)
        and name.split("/")[-1] in ("a.jpg", "B.PNG", "bare", "LICENSE", "frame.01", "broken.jpg")
        and name[0] not in "@_"
        for name, content in files.items()
    )
    assert read == images + 1


@given(ENTRIES, st.sampled_from(["w", "w:gz"]))
@settings(max_examples=40, deadline=None)
def test_every_member_of_a_tar_is_accounted_for(tmp_path_factory, files, mode):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    path.write_bytes(tar_bytes(*files.items(), ("sure.jpg", JPEG), mode=mode))
    source = open_inputs(str(path))
    assert sum(accounted(source)) + source.skipped.total() == len(files) + 1


@given(st.lists(st.sampled_from([JPEG, b"text", None]), min_size=1, max_size=6), st.booleans())
@settings(max_examples=20, deadline=None)
def test_every_line_and_every_row_is_accounted_for(tmp_path_factory, contents, as_list):
    root = tmp_path_factory.mktemp("rows")
    if as_list:
        for number, content in enumerate(contents):
            if content is not None:
                (root / f"{number}.txt").write_bytes(content)
        path = root / "list"
        path.write_text("\n".join(f"{number}.txt" for number in range(len(contents))))
    else:
        path = root / "x.parquet"
        with duckdb.connect() as database:
            database.execute("CREATE TABLE t (image BLOB)")
            database.executemany("INSERT INTO t VALUES (?)", [[content] for content in contents])
            database.table("t").write_parquet(str(path))
    source = open_inputs(str(path))
    assert accounted(source) == (contents.count(JPEG), len(contents) - contents.count(JPEG))
    assert source.skipped.total() == 0
