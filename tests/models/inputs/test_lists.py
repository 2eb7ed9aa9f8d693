"""Text files of names, as editors of every system write them."""

import pytest

from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.lists import read_labels, read_names


@pytest.mark.parametrize(
    "content",
    [
        b"tench, a fish\ngr\xc3\xbcn\n",
        b"tench, a fish\ngr\xc3\xbcn",
        b"\xef\xbb\xbftench, a fish\r\ngr\xc3\xbcn\r\n",
        b"\n  tench, a fish \n \t \r\n\ngr\xc3\xbcn\t\n\n",
    ],
    ids=["plain", "no last line end", "Windows", "blanks"],
)
def test_labels_of_a_file(tmp_path, content):
    (tmp_path / "names.txt").write_bytes(content)
    assert read_labels(tmp_path / "names.txt") == ("tench, a fish", "grün")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names.txt: there are no labels; give one label per line"),
        (b"\xef\xbb\xbf \n\n", "names.txt: there are no labels"),
        (b"cat\ndog\ncat \n", "names.txt: labels must differ from one another, but 'cat' is given twice"),
        ("cat\n".encode("utf-16"), "the file of labels .*names.txt is not UTF-8 text; save it as UTF-8"),
        ("cat\n".encode("utf-16-be"), "is not UTF-8 text"),
        ("grün\n".encode("latin-1"), "is not UTF-8 text"),
        (None, "the file of labels .*names.txt cannot be read: No such file"),
    ],
)
def test_files_that_hold_no_labels(tmp_path, content, message):
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_labels(tmp_path / "names.txt")


def test_names_may_be_there_twice(tmp_path):
    """The second `crane` of a list of classes is another class."""
    (tmp_path / "classes.txt").write_text("crane\nox\ncrane\n")
    assert read_names(tmp_path / "classes.txt", "class names") == ["crane", "ox", "crane"]
