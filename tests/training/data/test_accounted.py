"""Training, too: what is offered is read, broken, or counted among what was left out."""

import io
import tarfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrine.models.inputs.skipped import Reason
from vitrine.training.data.images import load
from vitrine.training.data.sources import open_images
from vitrine.training.recipes.image_sources import FolderSource, WebDatasetSource


def encoded():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "JPEG")
    return buffer.getvalue()


GOOD = encoded()
NAMES = st.sampled_from(["a.jpg", "B.PNG", "bare", "x.txt", "._a.jpg", "Thumbs.db", "frame.01", "t.tar"])
CONTENTS = st.sampled_from([GOOD, b"text", GOOD[: len(GOOD) // 2]])


def read_all(images):
    """(read, broken): every image of a source once; a broken one is given the next one's place."""
    for pixels, _ in load(images, [[index] for index in range(len(images))], workers=0):
        assert pixels.shape == (1, 3)
    return len(images) - len(images.broken), len(images.broken)


def opened(source, root):
    return open_images(source, root, lambda image: torch.zeros(3), max_broken=1.0)


@given(st.dictionaries(st.tuples(st.sampled_from(["ant/", "bee/", "bee/deep/", ""]), NAMES).map("".join), CONTENTS))
@settings(max_examples=40, deadline=None)
def test_every_file_of_class_folders(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("classes")
    for name, content in {**files, "cat/sure.jpg": GOOD}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    images = opened(FolderSource(kind="folder", path="."), root)
    empty = images.listing.skipped.counts.get(Reason.EMPTY, 0)  # folders, whose files are counted for themselves
    assert sum(read_all(images)) + images.listing.skipped.total() - empty == len(files) + 1
    good = {name for name, content in files.items() if content == GOOD and "/" in name}
    read = [name for name in good if name.rpartition("/")[2] in ("a.jpg", "B.PNG", "bare", "frame.01")]
    assert read_all(images)[0] == len(read) + 1


EXTENSIONS = st.sampled_from(["jpg", "input.jpg", "mask.png", "cls", "txt", "json", "jpg.txt"])


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.lists(st.tuples(st.sampled_from("abc"), EXTENSIONS), unique=True), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_member_of_a_shard(tmp_path_factory, members, litter):
    root = tmp_path_factory.mktemp("shards")
    names = [f"{key}.{extension}" for key, extension in members] + ["sure.jpg"] + ["._sure.jpg"] * litter
    with tarfile.open(root / "x.tar", "w") as tar:
        for name in names:
            content = GOOD if name.endswith(("jpg", "png")) else b"0"
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    images = opened(WebDatasetSource(kind="webdataset", shards="x.tar"), root)
    skipped = images.listing.skipped.counts
    pictures = sum(name.endswith((".jpg", ".png")) and not name.startswith(".") for name in names)
    assert sum(read_all(images)) + skipped.get(Reason.EXTRA, 0) == pictures
    assert skipped.get(Reason.LITTER, 0) == litter
    assert skipped.get(Reason.NO_SAMPLE, 0) == sum(name.endswith(".json") for name in names)
    with_picture = {key for key, extension in members if extension.endswith(("jpg", "png"))}
    alone = {key for key, extension in members if extension in ("cls", "txt", "jpg.txt")} - with_picture
    assert skipped.get(Reason.NO_PICTURE, 0) == len(alone)
