"""Parquet files: one pass, every row group decoded once, and paths that never touch the data."""

import os
import random
from pathlib import Path

import duckdb
import pytest
from making import JPEG, names_and_contents

from vitrine.models.inputs import parquet as parquet_module
from vitrine.models.inputs.duck import connect
from vitrine.models.inputs.errors import InputError, MissingImage, Unreadable
from vitrine.models.inputs.opening import open_inputs
from vitrine.models.inputs.skipped import Reason


def write(path, query="SELECT printf('%04d', range)::BLOB AS image FROM range(10)", group=2048):
    path.parent.mkdir(parents=True, exist_ok=True)
    with duckdb.connect() as database:
        database.execute(f"COPY ({query}) TO '{path.parent / 'plain'}' (FORMAT parquet, ROW_GROUP_SIZE {group})")
    (path.parent / "plain").rename(path)


def rows(*numbers):
    return [f"{number:04}".encode() for number in numbers]


@pytest.fixture
def queries(monkeypatch):
    """The rows at which queries begin."""
    begun, init = [], parquet_module._Pass.__init__
    monkeypatch.setattr(
        parquet_module._Pass, "__init__", lambda self, table, first: begun.append(first) or init(self, table, first)
    )
    return begun


def read(reader, start, stop):
    return [item.read() for item in reader.items(start, stop)]


def test_one_query_reads_all_parts_of_a_file(tmp_path, queries):
    write(tmp_path / "x.parquet", "SELECT printf('%04d', range)::BLOB AS image FROM range(5000)")
    reader = open_inputs(str(tmp_path / "x.parquet")).reader()
    found = [content for start in range(0, 5000, 512) for content in read(reader, start, start + 512)]
    assert found == rows(*range(5000))
    assert queries == [0]


def test_a_part_ahead_goes_on_with_the_query_unless_a_row_group_lies_between(tmp_path, queries):
    """Row groups of 2,048, 2,048 and 904 rows."""
    write(tmp_path / "x.parquet", "SELECT printf('%04d', range)::BLOB AS image FROM range(5000)")
    source = open_inputs(str(tmp_path / "x.parquet"))
    assert source.tables[0].groups == [0, 2048, 4096, 5000]
    reader = source.reader()
    for start, begun in ((5, [5]), (100, [5]), (2040, [5]), (2045, [5]), (4500, [5, 4500]), (4600, [5, 4500])):
        assert read(reader, start, start + 4) == rows(*range(start, start + 4))
        assert queries == begun
    assert read(reader, 1, 2) == rows(1)
    assert queries == [5, 4500, 1]


def test_a_row_group_is_not_read_before_its_first_row(tmp_path):
    """`pandas` writes one for all rows; where it is read ahead as a whole, it is in memory as a whole."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    chance = random.Random(0)
    images = [chance.randbytes(2000) for _ in range(16384)]
    parquet.write_table(pyarrow.table({"image": images}), tmp_path / "x.parquet")
    source = open_inputs(str(tmp_path / "x.parquet"))
    assert source.tables[0].groups == [0, 16384]
    before = bytes_read()
    assert read(source.reader(), 0, 8) == images[:8]
    assert bytes_read() - before < (tmp_path / "x.parquet").stat().st_size / 2


def bytes_read():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_paths_never_touch_the_data(tmp_path):
    """By default DuckDB would make columns of the folders, and globs of the names."""
    for name in ("image=x/id=3/[2024] *?.parquet", "name=y/\udcff.parquet", "a'b\".parquet"):
        write(tmp_path / name, "SELECT 'right'::BLOB AS image, 'n' AS name")
        (content,) = names_and_contents(open_inputs(str(tmp_path / name)))
        assert content[1] == b"right", name


def test_the_hubs_layout_and_paths(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    os.mkfifo(tmp_path / "pipe.jpg")
    values = ["{bytes: 'x'::BLOB, path: 'p'}", "{bytes: NULL, path: 'a.jpg'}", "{bytes: NULL, path: NULL}"]
    values += ["{bytes: NULL, path: 'pipe.jpg'}", "NULL"]
    write(tmp_path / "x.parquet", " UNION ALL ".join(f"SELECT {value} AS image" for value in values))
    contents = [content for _, content in names_and_contents(open_inputs(str(tmp_path / "x.parquet")))]
    assert contents[:2] == [b"x", JPEG]
    assert [type(content) for content in contents[2:]] == [MissingImage, Unreadable, MissingImage]


def test_damaged_and_missing_files_end_the_run_or_are_named(tmp_path):
    write(tmp_path / "0.parquet")
    (tmp_path / "1.parquet").write_bytes(b"PAR1 and nothing else")
    pattern = str(tmp_path / "{0..2}.parquet")
    with pytest.raises(InputError, match=r"1\.parquet is not a readable Parquet file: .* --skip-broken-shards"):
        open_inputs(pattern)
    source = open_inputs(pattern, skip_broken=True)
    assert (len(source), source.skipped.counts) == (10, {Reason.BROKEN: 2})


@pytest.mark.parametrize("skip_broken", [False, True])
def test_a_file_whose_pages_are_damaged(tmp_path, skip_broken, queries):
    """The last of its row groups: what lies well before it is read."""
    write(tmp_path / "x.parquet", "SELECT repeat(printf('%04d', range), 50)::BLOB AS image FROM range(12288)")
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    with connect() as database:
        offsets = database.execute("SELECT data_page_offset FROM parquet_metadata(?)", [str(tmp_path / "x.parquet")])
        last = offsets.fetchall()[-1][0]
    content[last : last + 2000] = b"\xff" * 2000
    (tmp_path / "x.parquet").write_bytes(content)
    source = open_inputs(str(tmp_path / "x.parquet"), skip_broken=skip_broken)
    if not skip_broken:
        with pytest.raises(InputError, match=r"x\.parquet is not a readable Parquet file: "):
            names_and_contents(source)
        return
    contents = [content for _, content in names_and_contents(source)]
    assert contents[:2048] == [number * 50 for number in rows(*range(2048))]
    failed = [isinstance(content, Unreadable) for content in contents]
    assert failed == sorted(failed)  # from some row on
    assert sum(failed) >= 2048
    assert len(queries) == 1  # it is not tried again for each row


def test_metadata_with_another_bit_are_read_or_refused(tmp_path):
    """Numbers are signed by their lowest bit: rows would be fewer than none."""
    write(tmp_path / "x.parquet", "SELECT 'a'::BLOB AS image")
    content = (tmp_path / "x.parquet").read_bytes()
    outcomes = set()
    footer = range(len(content) - 8 - int.from_bytes(content[-8:-4], "little"), len(content) - 8)
    for at in (at for at in footer if content[at] == 2):  # as 1 is written, the number of rows
        damaged = bytearray(content)
        damaged[at] ^= 1
        (tmp_path / "x.parquet").write_bytes(damaged)
        try:
            outcomes.add(len(names_and_contents(open_inputs(str(tmp_path / "x.parquet")))))
        except InputError as error:
            outcomes.add("metadata" if "metadata are damaged" in str(error) else "refused")
    assert outcomes == {1, "metadata", "refused"}


def test_columns(tmp_path):
    write(tmp_path / "x.parquet", 'SELECT \'a\'::BLOB AS a, \'b\'::BLOB AS "b ""c""", 1 AS n')
    assert names_and_contents(open_inputs(str(tmp_path / "x.parquet"), 'b "c"')) == [("x.parquet#0", b"b")]
    for column, message in ((None, "which column"), ("x", "no column 'x'"), ("n", "neither bytes nor paths")):
        with pytest.raises(InputError, match=message):
            open_inputs(str(tmp_path / "x.parquet"), column)
