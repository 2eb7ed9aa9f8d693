"""What is read from a bundle are the files that were verified, whatever their paths name by then."""

import os
import shutil

import numpy as np
import pytest

from broken import copy, replace_file
from vitrine.models.bundle import cards as cards_module
from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.cards import Cards, CardsError
from vitrine.models.bundle.files import is_finite
from vitrine.models.bundle.label_sets import LabelSetError, read_label_sets


@pytest.fixture
def path(carded, tmp_path):
    return copy(carded.path, tmp_path / "bundle")


def away(path):
    """Its directory is another by now."""
    path.rename(path.with_name("renamed"))
    path.mkdir()
    (path / "cards").mkdir()


def gone(path):
    shutil.rmtree(path)


def replaced(path):
    for name in ("features", "images"):
        replace_file(path / f"cards/{name}.parquet", b"nothing of the kind")


@pytest.mark.parametrize("change", [away, gone, replaced])
def test_cards_are_those_that_were_opened(path, change):
    bundle = open_bundle(path)
    place = next(i for i in range(64) if bundle.cards.card(1, i).exemplars)
    known = bundle.cards.card(1, place), bundle.cards.images([3]), bundle.cards.search(None, None, 0, 5)
    change(path)
    assert (bundle.cards.card(1, place), bundle.cards.images([3]), bundle.cards.search(None, None, 0, 5)) == known
    bundle.close()


@pytest.mark.parametrize("target", ["another", "nowhere"])
def test_a_link_is_followed_once(path, tmp_path, target):
    link = tmp_path / "link"
    link.symlink_to(path)
    bundle = open_bundle(link)
    link.unlink()
    (tmp_path / "another").mkdir()
    link.symlink_to(tmp_path / target)
    assert bundle.path == path
    assert len(bundle.directions) == len(bundle.fold) // 10 == 3
    assert bundle.cards.card(0, 0).index == 0
    bundle.check_unchanged()
    bundle.close()


@pytest.mark.parametrize("how", ["replaced", "written to", "gone"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("directions.npy", lambda bundle: bundle.directions),
        ("fold.npy", lambda bundle: bundle.fold),
        ("attention.npy", lambda bundle: bundle.attention_fold),
        ("cards/features.parquet", lambda bundle: bundle.cards),
        ("cards/images.parquet", lambda bundle: bundle.cards),
        ("cards/references.npz", lambda bundle: bundle.cards),
        ("vision.onnx", lambda bundle: bundle.check_unchanged()),
    ],
)
def test_what_was_changed_since_it_was_verified_is_refused(path, name, read, how):
    file = path / name
    replace_file(file, file.read_bytes())  # no longer a hard link of another test's
    bundle = open_bundle(path)
    if how == "written to":
        with file.open("r+b") as stream:
            stream.write(b"?")
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # however coarse the clock is
    else:
        file.rename(path / "before")
    if how == "replaced":
        shutil.copy(path / "before", file)
    with pytest.raises(BundleError, match=f"{name} (has changed since it was verified|cannot be read)"):
        read(bundle)


def test_where_descriptors_have_no_path_a_replaced_table_is_refused(path, monkeypatch, tmp_path):
    monkeypatch.setattr(cards_module, "DESCRIPTORS", tmp_path / "no-proc")
    bundle = open_bundle(path)
    assert bundle.cards.card(0, 0).index == 0
    replaced(path)
    with pytest.raises(CardsError, match=r"features\.parquet was replaced while its bundle was in service"):
        bundle.cards.card(0, 0)
    bundle.close()


def opened():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors cannot be counted")
def test_no_file_stays_open(path):
    before = opened()
    bundle = open_bundle(path)
    assert opened() == before
    assert bundle.cards.card(0, 0)
    assert opened() > before
    bundle.close()
    assert opened() == before
    with pytest.raises(CardsError, match="no longer in service"):
        bundle.cards.card(0, 0)
    bundle.close()  # twice is once
    del bundle
    Cards(path, (64,) * 3)  # nobody closes it
    assert opened() == before
    with pytest.raises(CardsError):
        Cards(path, (64,) * 4)
    assert opened() == before


def test_a_pipe_is_no_file(path, tmp_path):
    """To open one blocks until somebody writes to it."""
    (tmp_path / "sets").mkdir()
    os.mkfifo(tmp_path / "sets/pets.json")
    with pytest.raises(LabelSetError, match=r"pets\.json cannot be read: .* not a regular file"):
        read_label_sets(tmp_path / "sets")
    for name in ("fold.npy", "manifest.json"):
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(BundleError, match=f"{name} (is missing|cannot be read)"):
            open_bundle(path)


def test_a_circle_of_links_and_a_manifest_without_end_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(BundleError, match=r"a (cannot be opened|is not a directory)"):
        open_bundle(tmp_path / "a")
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(2**40)  # a hole, which takes no space
    with pytest.raises(BundleError, match=r"manifest\.json is larger than"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_value_that_is_not_finite_is_found(dtype, order):
    for value in (np.nan, np.inf, -np.inf):
        table = np.asarray(np.linspace(-60_000, 60_000, 24).reshape(2, 3, 4), dtype, order=order)
        assert is_finite(table)
        table[1, 1, 1] = value
        assert not is_finite(table)
