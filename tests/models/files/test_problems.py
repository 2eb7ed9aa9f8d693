"""What the operating system refuses, as one sentence."""

import errno
import os
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from faults import largest_file
from vitrine.models.bundle.files import BundleError
from vitrine.models.files.errors import FileError
from vitrine.models.files.names import check_name, display
from vitrine.models.files.problems import REMEDIES, naming, sentence

FILE = Path("/somewhere/out/file")


@pytest.mark.parametrize("code", REMEDIES)
def test_every_refusal_is_a_sentence_with_the_file_and_a_remedy(code):
    assert sentence(OSError(code, os.strerror(code), "/a/b")) == f"/a/b: {os.strerror(code)}; {REMEDIES[code]}"
    with pytest.raises(FileError) as raised, naming(FILE):
        raise OSError(code, os.strerror(code))
    assert str(raised.value) == f"{FILE} cannot be written: {os.strerror(code)}; {REMEDIES[code]}"


@pytest.mark.parametrize("error", [ValueError("No space left on device"), OSError("torn"), KeyError("x")])
def test_what_the_file_system_did_not_refuse_is_none(error):
    assert sentence(error) is None


def test_what_the_system_says_more_is_kept():
    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    assert sentence(error) == "No usable temporary directory found in ['/tmp']; check the path"


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        (None, "/somewhere/out/file cannot be written"),
        ("/somewhere/out/.file.partial", "/somewhere/out/file cannot be written"),
        ("/somewhere/out/.bundle-xyz/file/part", "/somewhere/out/file cannot be written"),
        ("/somewhere/out/file/inside", "/somewhere/out/file cannot be written"),
        ("/somewhere/out/other", "/somewhere/out/other cannot be used"),
        ("/elsewhere", "/elsewhere cannot be used"),
        (b"/somewhere/out/.x", "/somewhere/out/file cannot be written"),
    ],
)
def test_the_file_that_is_written_is_named_not_its_temporary(filename, expected):
    with pytest.raises(FileError, match=rf"^{expected}: Input/output error; "), naming(FILE):
        raise OSError(errno.EIO, os.strerror(errno.EIO), filename)


@pytest.mark.parametrize("library", ["python", "numpy", "safetensors", "duckdb"])
def test_libraries_that_hide_the_number_of_the_error(tmp_path, library):
    """Real errors: the file may not grow beyond 4,096 bytes."""
    file, values = tmp_path / "file.npy", np.random.default_rng(0).integers(0, 2**62, 65536)
    write = {
        "python": lambda: file.write_bytes(bytes(8192)),
        "numpy": lambda: np.save(file, values),
        "safetensors": lambda: save_file({"x": torch.from_numpy(values)}, file),
        "duckdb": lambda: duckdb.sql("SELECT random() FROM range(100_000)").write_parquet(str(file)),
    }[library]
    with pytest.raises(FileError) as raised, largest_file(4096), naming(file):
        write()
    problem = "No space left on device" if library == "numpy" else "File too large"
    assert str(raised.value).startswith(f"{file} cannot be written: {problem}; ")


@pytest.mark.parametrize("error", [ValueError("a mistake of ours"), OSError("cannot identify image file")])
def test_a_bug_stays_a_bug(error):
    with pytest.raises(type(error)) as raised, naming(FILE):
        raise error
    assert raised.value is error


def test_our_own_errors_say_more():
    with pytest.raises(BundleError, match=r"^mine$"), naming(FILE):
        raise BundleError("mine")


def test_names_that_are_no_utf_8():
    check_name(Path("/tmp/größe/寿司"))
    with pytest.raises(FileError, match=r"^/tmp/a\\xffb has a name that is not UTF-8; rename it"):
        check_name(Path(os.fsdecode(b"/tmp/a\xffb")))
    assert display(b"/tmp/\xc3\xa4\xfe") == "/tmp/ä\\xfe"
