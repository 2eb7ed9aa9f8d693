"""Tables of images, labels and groups: what is read, how halves are made, and each refusal by name."""

import numpy as np
import pytest

from vitrine.service.offline.debias.errors import DebiasError
from vitrine.service.offline.debias.examples import draw_half, of_folders, of_table
from vitrine.service.offline.debias.table import Row, parse_columns, read_table

WATERBIRDS = """img_id,img_filename,y,split,place,place_filename
1,001/a.jpg,0,0,0,/b/bamboo
2,001/b.jpg,1,1,1,/o/ocean
3,002/c.jpg,0,2,1,/o/ocean
"""


@pytest.fixture
def write(tmp_path):
    def make(text):
        file = tmp_path / "metadata.csv"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return make


def test_waterbirds_table_is_read_as_it_is_published(write):
    rows = read_table(write(WATERBIRDS), {}, ["landbird", "waterbird"])
    assert rows[1] == Row("001/b.jpg", "waterbird", "1", "1")
    assert [row.label for row in rows] == ["landbird", "waterbird", "landbird"]


def test_columns_may_be_named_and_a_byte_order_mark_is_nothing(write):
    columns = parse_columns("image=f, label=kind,group=mat")
    assert columns == {"image": "f", "label": "kind", "group": "mat"}
    assert read_table(write(b"\xef\xbb\xbff,kind,mat\na.png,cat,red\n"), columns, None) == [
        Row("a.png", "cat", "red", None)
    ]


@pytest.mark.parametrize(
    ("text", "columns", "labels", "said"),
    [
        ("", {}, None, "is empty"),
        ("image,label\n", {}, None, "no images, only a first line"),
        ("image,label\na.png\n", {}, None, "line 2 has 1 fields, but the first line has 2"),
        ("photo,label\na,b\n", {}, None, "no column with a known name for the image.*--columns image=NAME"),
        ("image,label\na,b\n", {"group": "mat"}, None, "no column mat; its columns are image, label"),
        ("image,y\na,0\n", {}, None, "has numbers as labels; give their names"),
        ("image,y\na,2\n", {}, ["cat", "dog"], "has a label 2, but --labels names only 2"),
        ("image,label\na,cow\n", {}, ["cat", "dog"], "label 'cow', which is not among cat, dog"),
        (b"image,label\n\xff,cat\n", {}, None, "is not CSV in UTF-8"),
        ('image,label\n"a,cat\n', {}, None, "is not CSV: "),
    ],
)
def test_what_is_wrong_with_a_table_is_said(write, text, columns, labels, said):
    with pytest.raises(DebiasError, match=said):
        read_table(write(text), columns, labels)


def test_wrong_columns_are_refused():
    with pytest.raises(DebiasError, match=r"give KIND=NAME, where KIND is one of image, label, group, split"):
        parse_columns("picture=f")


def rows(count, splits=("",), labels=("cat", "dog"), groups=("plain", "red")):
    return [
        Row(f"{n}.png", labels[n % len(labels)], groups[n // 2 % len(groups)], splits[n % len(splits)] or None)
        for n in range(count)
    ]


def test_halves_are_the_splits_where_they_have_usual_names_or_are_named():
    table = [row._replace(split=("train", "val", "test")[number // 2 % 3]) for number, row in enumerate(rows(96))]
    examples = of_table(table, None, 0, None)
    assert (len(examples), examples.finding.sum()) == (64, 32)
    assert examples.label_names == ("cat", "dog")
    swapped = of_table(table, None, 0, ("test", "val"))
    assert {image for image, found in zip(swapped.images, swapped.finding, strict=True) if found} == {
        row.image for row in table if row.split == "test"
    }
    with pytest.raises(DebiasError, match="--splits names other, but the table has test, train, val"):
        of_table(table, None, 0, ("val", "other"))


def test_drawn_halves_have_their_part_of_every_cell():
    cells = np.repeat([0, 1, 3], [10, 7, 2])
    finding = draw_half(cells, seed=3)
    assert [int(finding[cells == cell].sum()) for cell in (0, 1, 3)] == [5, 4, 1]
    assert (finding == draw_half(cells, seed=3)).all()
    assert (finding != draw_half(cells, seed=4)).any()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (rows(64, labels=("cat",)), "all images have one label, cat"),
        (rows(20), "the finding half has 6 images of 'cat'; at least 8"),
        (rows(64, groups=("red",)), "all 32 images of the finding half belong to one group, red"),
        ([row._replace(group=row.label) for row in rows(64)], "has only one label; .* not label and cue"),
    ],
)
def test_images_that_do_not_do_are_refused(table, said):
    with pytest.raises(DebiasError, match=said):
        of_table(table, None, 0, None).check_groups()


def test_class_folders_say_the_labels(data_root, tmp_path):
    examples = of_folders(data_root / "train", None, 0)
    assert examples.label_names == ("blue triangle", "green square", "red circle")
    assert examples.images[0].startswith("blue triangle/")
    assert (len(examples), examples.finding.sum(), examples.group_names) == (48, 24, ("all",))
    with pytest.raises(DebiasError, match="a folder 'blue triangle', which is not one of the labels"):
        of_folders(data_root / "train", ("red circle", "green square"), 0)
