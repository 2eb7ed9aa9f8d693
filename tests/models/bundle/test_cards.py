"""Reading a bundle's cards."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.cards import Cards, CardsError
from vitrine.models.bundle.sealing import seal


@pytest.fixture
def cards(carded):
    return Cards(carded.path, (64,) * 3)


@pytest.fixture(scope="module")
def table(carded):
    """features.parquet as read by pyarrow, a different reader from the one under test."""
    return pq.read_table(carded.path / "cards/features.parquet").to_pylist()


def test_every_card_is_its_row(cards, table):
    assert len(table) == 3 * 64
    for row in table[::7]:
        card = cards.card(row["layer"], row["index"])
        for name, value in row.items():
            field = getattr(card, name)
            if name in ("exemplars", "coactive"):
                assert [vars(item) for item in field] == value
            else:
                assert field == value, name


def test_labels_are_known_without_a_query(cards, table):
    for row in table:
        expected = (row["label"], row["label_score"] if row["label"] else None)
        assert cards.label(row["layer"], row["index"]) == expected


def test_there_is_no_card_beyond_the_last(cards):
    with pytest.raises(KeyError):
        cards.card(0, 64)


def test_a_search_is_a_page_of_the_best(cards, table):
    labelled = [row for row in table if row["label"]]
    order = sorted(labelled, key=lambda row: (-row["label_score"], row["layer"], row["index"]))
    total, everything = cards.search(None, None, 0, 1000)
    assert total == len(labelled) > 10
    assert [(line.layer, line.index) for line in everything] == [(row["layer"], row["index"]) for row in order]
    assert cards.search(None, None, 3, 4) == (total, everything[3:7])
    assert cards.search(None, None, total, 4) == (total, [])


def test_a_search_by_label_and_layer(cards, table):
    label = next(row["label"] for row in table if row["label"])
    part = label[1:-1].upper()
    for layer in (None, 1):
        expected = [
            (row["layer"], row["index"])
            for row in table
            if row["label"] and part.lower() in row["label"].lower() and layer in (None, row["layer"])
        ]
        total, lines = cards.search(part, layer, 0, 1000)
        assert (total, sorted((line.layer, line.index) for line in lines)) == (len(expected), sorted(expected))


@pytest.mark.parametrize("text", ["%", "_", "'; DROP TABLE x; --", "\\", "\0", "🐈"])
def test_a_search_takes_any_text_as_it_is(cards, text):
    assert cards.search(text, None, 0, 10) == (0, [])


def test_images_in_the_order_asked_for(cards):
    first, again, other = cards.images([7, 7, 2])
    assert first == again
    assert [first, other] == cards.images([7, 2])
    assert first.name.startswith(f"train/{first.class_name}/")
    assert cards.images([]) == []


def test_similarity_is_the_cosine_of_dense_codes(cards):
    indices, values = cards.references
    dense = np.zeros((*indices.shape[:2], 64))
    for image, layer, place in zip(*np.nonzero(values), strict=True):
        dense[image, layer, indices[image, layer, place]] = values[image, layer, place]
    for layer in range(3):
        query = dense[5, layer]
        expected = (
            dense[:, layer] @ query / np.maximum(np.linalg.norm(dense[:, layer], axis=1) * np.linalg.norm(query), 1e-9)
        )
        similarities = cards.similarities(layer, indices[5, layer], values[5, layer].astype(np.float32))
        assert similarities == pytest.approx(expected, abs=1e-3)
        assert similarities[5] == pytest.approx(1, abs=1e-3) or not query.any()
    nothing = cards.similarities(0, indices[5, 0], np.zeros_like(values[5, 0], np.float32))
    assert not nothing.any()


def test_threads_may_share_it(cards, table):
    def read(row):
        return cards.card(row["layer"], row["index"]).index, cards.images([row["index"] % 40])[0].name

    expected = [read(row) for row in table[:40]]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, table[:40])) == expected


def test_cards_of_another_shape_are_refused(carded):
    with pytest.raises(CardsError, match=r"192 rows for 256 features in 4 layers"):
        Cards(carded.path, (64,) * 4)


@pytest.mark.parametrize("name", ["features.parquet", "images.parquet", "references.npz"])
def test_a_damaged_table_is_reported_when_the_bundle_is_opened(carded, tmp_path, name):
    copy = shutil.copytree(carded.path, tmp_path / "copy")
    (copy / "cards" / name).write_bytes(b"nothing of the kind")
    with pytest.raises(BundleError, match=r"sha256|bytes"):
        open_bundle(copy)
    resealed = seal(copy, carded.manifest)  # as if it had been written this way
    with pytest.raises(BundleError, match="cards"):
        _ = resealed.cards


def test_a_path_with_a_quote_in_it(carded, tmp_path):
    copy = shutil.copytree(carded.path, tmp_path / "it's")
    assert Cards(copy, (64,) * 3).card(0, 1) == carded.cards.card(0, 1)


def test_a_bundle_without_cards_has_none(bundle):
    assert bundle.cards is None


def column(name, value, row=5):
    """One value of features.parquet is another."""

    def change(folder):
        rows = pq.read_table(folder / "cards/features.parquet")
        values = rows[name].to_pylist()
        values[row] = value(values[row]) if callable(value) else value
        changed = rows.set_column(
            rows.schema.get_field_index(name), name, pa.array(values, rows.schema.field(name).type)
        )
        pq.write_table(changed, folder / "cards/features.parquet")

    return change


def references(**changes):
    def change(folder):
        with np.load(folder / "cards/references.npz") as stored:
            arrays = dict(stored)
        for name, value in changes.items():
            arrays[name][0, 0, 0] = value
        np.savez(folder / "cards/references.npz", **arrays)

    return change


def without_column(folder):
    rows = pq.read_table(folder / "cards/features.parquet")
    pq.write_table(rows.drop_columns(["exemplars"]), folder / "cards/features.parquet")


def without_image(folder):
    rows = pq.read_table(folder / "cards/images.parquet")
    pq.write_table(rows.slice(1), folder / "cards/images.parquet")


EXEMPLAR, COACTIVE = {"image": 0, "activation": 1.0, "mask": b"x"}, {"layer": 0, "index": 0, "jaccard": 0.5}
WRONG = {
    "score NaN": (column("label_score", float("nan")), "not finite"),
    "frequency missing": (column("frequency_cls", None), "missing or not finite"),
    "quantile infinite": (column("quantiles", [0, 1, 2, 3, float("inf")]), "not finite"),
    "two quantiles": (column("quantiles", [0.0, 1.0]), "invalid values"),
    "no such reading": (column("read_at", "nose"), "invalid values"),
    "a feature twice": (column("index", 4), "features that are listed twice"),
    "a feature that does not exist": (column("index", 64, row=191), "features that do not exist"),
    "activation NaN": (column("exemplars", [EXEMPLAR | {"activation": float("nan")}]), "exemplars that are not finite"),
    "no such image": (column("exemplars", [EXEMPLAR | {"image": 999}]), "exemplars .* no image"),
    "coactive beyond": (column("coactive", [COACTIVE | {"layer": 3}]), "coactive features that do not exist"),
    "coactive NaN": (column("coactive", [COACTIVE | {"jaccard": float("nan")}]), "coactive features .* not finite"),
    "no exemplars": (without_column, "exemplars"),
    "a reference image missing": (without_image, "images.parquet has too few reference images, missing: 1"),
    "code NaN": (references(values=float("nan")), "references.npz has values that are not finite"),
    "code of a feature that does not exist": (
        references(indices=64),
        "references.npz names a feature that does not exist",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_cards_that_could_not_be_answered_with_are_refused(carded, tmp_path, case):
    """When the bundle is loaded: a question would be answered 500, or with null where a number is promised."""
    change, message = WRONG[case]
    path = shutil.copytree(carded.path, tmp_path / "bundle")
    change(path)
    (path / "manifest.json").unlink()
    bundle = seal(path, carded.manifest)
    with pytest.raises(BundleError, match=message):
        _ = bundle.cards
