"""Folders: links, loops, litter, names without an extension, and what is not a regular file."""

import os
import socket
from pathlib import Path

import pytest
from making import JPEG, PNG, names_and_contents

from vitrine.models.files.names import display, printable
from vitrine.models.images.formats import SIGNATURES
from vitrine.models.inputs import folder as folder_module
from vitrine.models.inputs.errors import InputError, Unreadable
from vitrine.models.inputs.files import open_regular, read_file
from vitrine.models.inputs.folder import walk
from vitrine.models.inputs.names import Kind, kind, kind_of_path, starts_like_an_image
from vitrine.models.inputs.opening import open_inputs
from vitrine.models.inputs.skipped import Reason, Skipped


def make(root, *names, content=JPEG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("a.jpg a.JPG a.jpeg a.Jfif a.tiff a.heic a.b.avif", Kind.IMAGE),
        (".a.jpg ._a.jpg Thumbs.db DESKTOP.INI @eaDir __MACOSX .DS_Store", Kind.LITTER),
        ("a 0a1b2c frame.0001 jpg 12.05\xa0at\xa0night a.", Kind.BARE),
        ("a.tar A.TAR a.tgz a.tar.gz a.TAR.XZ a.tar.zst", Kind.TAR),
        ("a.parquet a.PQ", Kind.PARQUET),
        ("a.txt film.mp4 a.jpg.txt labels.csv.gz a.zip", Kind.OTHER),
    ],
)
def test_names(names, expected):
    assert {name: kind(name) for name in names.split(" ")} == dict.fromkeys(names.split(" "), expected)


def test_paths_are_litter_if_a_folder_is():
    assert kind_of_path("./a/../b.jpg") is Kind.IMAGE
    assert {kind_of_path(path) for path in ("__MACOSX/a.jpg", "a/@eaDir/b/c.jpg", ".git/a.jpg")} == {Kind.LITTER}


def test_every_format_is_told_by_its_first_bytes():
    starts = {"JPEG": JPEG, "PNG": PNG, "WEBP": b"RIFF1234WEBPVP8 ", "GIF": b"GIF89a", "BMP": b"BM1234\0\0\0\0"}
    starts |= {"TIFF": b"II*\0", "PPM": b"P6 1 1", "AVIF": b"\0\0\0\x1cftypavif", "HEIF": b"\0\0\0\x1cftypheic"}
    assert starts.keys() == SIGNATURES.keys()
    assert [name for name, start in starts.items() if not starts_like_an_image(start)] == []
    assert not any(map(starts_like_an_image, (b"", b"BMW, Audi", b"{}", b"PAR1", b"a" * 16)))


def test_links_are_followed_and_what_is_no_image_is_counted_and_named(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    make(root, "b.JPG", "a.jpg", "deep/er/c.png", ".hidden/d.jpg", "@eaDir/a.jpg", "._a.jpg", "Thumbs.db", "film.mp4")
    make(root, "x.txt", "y.txt", "z.txt", "w.txt")
    make(elsewhere, "linked.jpg")
    (root / "link").symlink_to(elsewhere)
    (root / "file.jpg").symlink_to(elsewhere / "linked.jpg")
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere")
    skipped = Skipped()
    found = walk(root, skipped)
    assert found.images == ["a.jpg", "b.JPG", "deep/er/c.png", "file.jpg", "gone.jpg", "link/linked.jpg"]
    assert skipped.lines() == [
        "left out, hidden files, or files of an operating system: 4 (._a.jpg; .hidden; @eaDir and 1 more)",
        "left out, not images, judging by their names: 5 (film.mp4; w.txt; x.txt and 2 more)",
    ]
    contents = dict(names_and_contents(open_inputs(str(root))))
    assert isinstance(contents.pop("gone.jpg"), FileNotFoundError)
    assert set(contents.values()) == {JPEG}


def test_loops_of_links_end(tmp_path):
    root = tmp_path / "root"
    make(root, "a/1.jpg", "b/2.jpg")
    (root / "a/up").symlink_to(root)
    (root / "a/self").symlink_to(root / "a")
    (root / "a/other").symlink_to(root / "b")
    (root / "itself.jpg").symlink_to(root / "itself.jpg")
    skipped = Skipped()
    assert walk(root, skipped).images == ["a/1.jpg", "a/other/2.jpg", "b/2.jpg", "itself.jpg"]
    assert skipped.names == {Reason.LOOP: ["a/self", "a/up"]}


def test_links_that_multiply_are_cut_off(tmp_path, monkeypatch):
    """Thirty folders with two links each to the next one: 2^30 paths."""
    monkeypatch.setattr(folder_module, "MOST_VISITS", 4)
    for number in range(30):
        make(tmp_path, f"{number}/x.jpg")
        for name in "ab":
            (tmp_path / f"{number}/{name}").symlink_to(tmp_path / f"{number + 1}")
    skipped = Skipped()
    assert len(walk(tmp_path, skipped).images) <= 31 * 4
    assert skipped.counts[Reason.LOOP] <= 30 * 8


def test_names_without_an_extension_are_told_by_their_first_bytes(tmp_path, monkeypatch):
    make(tmp_path, "ab/cdef", "frame.0001")
    make(tmp_path, "ab/0123", "LICENSE", content=b"text")
    make(tmp_path, "named.jpg")
    read, opened = folder_module.read_head, []
    monkeypatch.setattr(folder_module, "read_head", lambda path: opened.append(Path(path).name) or read(path))
    skipped = Skipped()
    assert walk(tmp_path, skipped).images == ["ab/cdef", "frame.0001", "named.jpg"]
    assert skipped.names == {Reason.NO_IMAGE: ["LICENSE", "ab/0123"]}
    assert "named.jpg" not in opened


def test_what_is_no_regular_file_is_named_and_nothing_waits_for_it(tmp_path, monkeypatch):
    make(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # a socket's name must be short
        listening.bind("s.jpg")
    skipped = Skipped()
    assert walk(tmp_path, skipped).images == ["a.jpg"]
    assert skipped.counts == {Reason.SPECIAL: 4}
    for name, message in (("pipe.jpg", "a named pipe"), ("s.jpg", "socket"), (".", "a folder")):
        with pytest.raises(Unreadable, match=message):
            open_regular(tmp_path / name)
    (tmp_path / "list.txt").write_text("pipe.jpg\na.jpg\n.\n")
    problems = [str(content) for _, content in names_and_contents(open_inputs(str(tmp_path / "list.txt")))]
    assert [" not a regular file" in problem for problem in problems] == [True, False, True]


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    make(tmp_path, "a/1.jpg", "b/2.jpg")
    scan = folder_module._scan

    def refusing(path):
        if path.endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(folder_module, "_scan", refusing)
    skipped = Skipped()
    assert walk(tmp_path, skipped).images == ["a/1.jpg"]
    assert skipped.lines() == ["left out, folders that cannot be read: 1 (b: Permission denied)"]
    with pytest.raises(InputError, match=r"the folder .*/b cannot be read: Permission denied"):
        walk(tmp_path / "b", skipped)


def test_files_are_read_up_to_a_size(tmp_path):
    make(tmp_path, "a.jpg", content=b"x" * 100)
    assert read_file(tmp_path / "a.jpg", 100) == b"x" * 100
    with pytest.raises(Unreadable, match="it has 100 bytes, but an image may have at most 99"):
        read_file(tmp_path / "a.jpg", 99)
    assert b"Linux" in read_file("/proc/version")  # its size is 0


def test_names_are_shown_as_valid_text():
    name = os.fsdecode(b"a\xff\xc3\xa9.jpg")
    assert display(name) == r"a\xffé.jpg"
    assert display(name).encode()
    assert printable("a\x1b[31m\n字.jpg") == r"a\x1b[31m\n字.jpg"
    assert printable("x" * 1000, 10) == "xxxxx…xxxxx"


def test_numbers_are_the_same_wherever_a_name_is_no_utf8(tmp_path):
    for name in (b"b.jpg", b"\xff.jpg", "é.jpg".encode()):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name)
    source = open_inputs(str(tmp_path))
    assert names_and_contents(source) == [("b.jpg", b"b.jpg"), ("é.jpg", "é.jpg".encode()), (r"\xff.jpg", b"\xff.jpg")]
