"""Images in tars: links, litter, several tars as one list, and compressed ones in one pass."""

import gzip
import tarfile

import pytest
from making import JPEG, PNG, member, names_and_contents, tar_bytes

from vitrine.models.inputs import shards as shards_module
from vitrine.models.inputs.errors import InputError, Unreadable
from vitrine.models.inputs.opening import open_inputs
from vitrine.models.inputs.skipped import Reason

HARD, SYMBOLIC = tarfile.LNKTYPE, tarfile.SYMTYPE
LINKS = [
    member("before.jpg", type=SYMBOLIC, linkname="1.jpg"),
    ("1.jpg", JPEG),
    member("2.jpg", type=HARD, linkname="1.jpg"),
    ("./a/b.png", PNG),
    member("a/c.png", type=SYMBOLIC, linkname="../a/./b.png"),
    member("chain.png", type=SYMBOLIC, linkname="a/c.png"),
    member("folder", type=SYMBOLIC, linkname="a"),
    member("through.png", type=SYMBOLIC, linkname="folder/b.png"),
    ("blob", JPEG + b"2"),
    member("named.jpg", type=HARD, linkname="blob"),
    member("bare", type=HARD, linkname="blob"),
]
NOWHERE = [
    member("out.jpg", type=SYMBOLIC, linkname="../../etc/passwd"),
    member("absolute.jpg", type=SYMBOLIC, linkname="/1.jpg"),
    member("x.jpg", type=SYMBOLIC, linkname="y.jpg"),
    member("y.jpg", type=SYMBOLIC, linkname="x.jpg"),
    member("gone.jpg", type=HARD, linkname="nowhere"),
]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "TAR", "without"])
def test_links_are_images_beside_their_targets(tmp_path, suffix):
    content = tar_bytes(*LINKS, *NOWHERE)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix in ("tar.gz", "without") else content)
    source = open_inputs(str(path))
    assert [(name.removeprefix(f"{path.name}/"), data) for name, data in names_and_contents(source)] == [
        ("1.jpg", JPEG),
        ("before.jpg", JPEG),
        ("2.jpg", JPEG),
        ("./a/b.png", PNG),
        ("a/c.png", PNG),
        ("chain.png", PNG),
        ("through.png", PNG),
        ("blob", JPEG + b"2"),
        ("named.jpg", JPEG + b"2"),
        ("bare", JPEG + b"2"),
    ]
    assert source.skipped.counts == {Reason.LINK: 6}  # "folder" among them
    assert f"{path.name}/out.jpg: to ../../etc/passwd" in source.skipped.names[Reason.LINK]


def test_a_link_in_tars_that_were_put_together_leads_into_its_own(tmp_path):
    link = member("2.jpg", type=HARD, linkname="1.jpg")
    content = tar_bytes(("1.jpg", b"a"), link) + tar_bytes(("1.jpg", b"b"), link)
    (tmp_path / "x.tar").write_bytes(content)
    names = names_and_contents(open_inputs(str(tmp_path / "x.tar")))
    assert names == [("x.tar/1.jpg", b"a"), ("x.tar/2.jpg", b"a"), ("x.tar/1.jpg", b"b"), ("x.tar/2.jpg", b"b")]


def test_litter_and_others_are_counted_as_in_folders(tmp_path):
    holes = member("holes.jpg", type=tarfile.GNUTYPE_SPARSE)
    members = [
        ("1.jpg", JPEG),
        ("._1.jpg", b"x"),
        ("__MACOSX/._1.jpg", b"x"),
        ("1.cls", b"3"),
        ("LICENSE", b"text"),
        holes,
    ]
    members += [member("folder/", type=tarfile.DIRTYPE), member("pipe.jpg", type=tarfile.FIFOTYPE)]
    (tmp_path / "x.tar").write_bytes(tar_bytes(*members))
    source = open_inputs(str(tmp_path / "x.tar"))
    assert names_and_contents(source) == [("x.tar/1.jpg", JPEG)]
    assert source.skipped.counts == {
        Reason.LITTER: 2,
        Reason.OTHER: 1,
        Reason.NO_IMAGE: 1,
        Reason.SPARSE: 1,
        Reason.SPECIAL: 1,
    }


def test_a_tar_without_its_end_is_read_with_a_warning(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_bytes(("1.jpg", JPEG), ("2.jpg", JPEG))[: 512 * 3 + len(JPEG)])
    source = open_inputs(str(tmp_path / "x.tar"))
    assert len(names_and_contents(source)) == 2
    assert source.skipped.lines() == [
        "x.tar has no end blocks: its last member is complete, but more may have been cut off"
    ]


@pytest.fixture
def compressed(tmp_path):
    """Two compressed tars of five images each."""
    for number in range(2):
        members = [(f"{image}.jpg", JPEG + bytes([number, image])) for image in range(5)]
        (tmp_path / f"{number}.tgz").write_bytes(gzip.compress(tar_bytes(*members)))
    return open_inputs(str(tmp_path / "{0,1}.tgz"))


@pytest.fixture
def opened(monkeypatch):
    """The names of the tars that are opened to be read."""
    names, open_stream = [], shards_module.open_stream
    monkeypatch.setattr(shards_module, "open_stream", lambda path: names.append(path.name) or open_stream(path))
    return names


def test_compressed_tars_are_decompressed_once_over_all_parts(compressed, opened):
    reader, found = compressed.reader(), []
    for start in range(0, 10, 3):
        found += [item.read() for item in reader.items(start, start + 3)]
    reader.close()
    assert found == [JPEG + bytes([number, image]) for number in range(2) for image in range(5)]
    assert opened == ["0.tgz", "1.tgz"]


def test_parts_that_lie_ahead_are_reached_without_beginning_anew(compressed, opened):
    reader = compressed.reader()
    for part, begun in (((1, 2), 1), ((3, 4), 1), ((8, 9), 2), ((9, 12), 2), ((7, 8), 3), ((0, 1), 4)):
        contents = [item.read()[-2:] for item in reader.items(*part)]
        assert contents == [bytes([number // 5, number % 5]) for number in range(part[0], min(part[1], 10))]
        assert len(opened) == begun
    reader.close()


def test_damaged_and_missing_tars_end_the_run_or_are_named(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_bytes(("1.jpg", JPEG)))
    (tmp_path / "1.tar").write_bytes(tar_bytes(("._x", b"x"), ("1.jpg", JPEG))[:1100])
    pattern = str(tmp_path / "{0..2}.tar")
    with pytest.raises(
        InputError, match=r"1\.tar is not a readable tar file: it is cut short: .* --skip-broken-shards"
    ):
        open_inputs(pattern)
    source = open_inputs(pattern, skip_broken=True)
    assert names_and_contents(source) == [("0.tar/1.jpg", JPEG)]
    assert source.skipped.lines() == [
        "left out, damaged or missing: 2 (1.tar: it is cut short: the header at byte 1,024 is incomplete; "
        "2.tar: No such file or directory)"
    ]
    with pytest.raises(InputError, match=r"has no images\. left out, damaged or missing: 2"):
        open_inputs(str(tmp_path / "{1..2}.tar"), skip_broken=True)


@pytest.mark.parametrize("skip_broken", [False, True])
def test_what_is_damaged_after_it_was_listed(tmp_path, skip_broken):
    members = [(f"{image}.jpg", JPEG) for image in range(4)]
    (tmp_path / "0.tgz").write_bytes(gzip.compress(tar_bytes(*members)))
    (tmp_path / "1.tar").write_bytes(tar_bytes(*members))
    source = open_inputs(str(tmp_path / "{0.tgz,1.tar}"), skip_broken=skip_broken)
    (tmp_path / "0.tgz").write_bytes(gzip.compress(tar_bytes(*members))[:60])
    (tmp_path / "1.tar").write_bytes(tar_bytes(*members)[:1500])
    if not skip_broken:
        with pytest.raises(InputError, match=r"0\.tgz is not a readable tar file: it is cut short"):
            names_and_contents(source)
    contents = [content for _, content in names_and_contents(source, 4 if not skip_broken else 0)]
    assert contents[-4] == JPEG
    assert all(isinstance(content, Unreadable) for content in contents[-3:] + contents[:-4])


def test_tars_of_one_name_are_told_apart(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.tar").write_bytes(tar_bytes((f"{folder}.jpg", JPEG)))
    source = open_inputs(str(tmp_path))
    assert (source.kind, [name for name, _ in names_and_contents(source)]) == (
        "shards",
        ["a/x.tar/a.jpg", "b/x.tar/b.jpg"],
    )


def test_the_digest_changes_with_whatever_changes_a_number(tmp_path):
    digests = set()
    for members in ([("1.jpg", b"a")], [("2.jpg", b"a")], [("1.jpg", b"ab")], [("x.txt", b""), ("1.jpg", b"a")]):
        (tmp_path / "x.tar").write_bytes(tar_bytes(*members))
        digests.add(open_inputs(str(tmp_path / "x.tar")).digest())
    assert len(digests) == 4
