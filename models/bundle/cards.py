"""Feature cards: what a feature fires on, as labels, numbers and images. Optional in a bundle, under cards/ for the
features of the CLT, under residual_cards/ for those of the residual SAEs.

    features.parquet   one row per feature, keyed by layer and index: the fields of `Card`
    images.parquet     one row per image used by cards and retrieval: the fields of `CardImage`
    references.npz     for retrieval, codes at [CLS] of the first N of those images: `indices` and `values` [N, L, k],
                       0 in unused places; of residual SAEs N is 0

Written by `vitrine cards` (training/cards). The Parquet tables are read with DuckDB, one row at a time, so that the
tables of a large dictionary stay on disk. They stay open, and are read by descriptor: a path may name another file by
then. No torch.

A feature is *read* at [CLS], where answers explain it, or, if it hardly ever fires there, at the patches. Its
activation on an image is the one at [CLS], or the largest over patches. Exemplars, quantiles, histogram and label all
refer to that reading.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal
from zipfile import BadZipFile

import duckdb
import numpy as np
from numpy.typing import NDArray

from vitrine.models.bundle.cards_check import feature_checks, image_checks
from vitrine.models.bundle.files import Identity, is_finite
from vitrine.models.bundle.layout import CARD_FILES, CARDS
from vitrine.models.errors import VitrineError
from vitrine.models.files.reading import open_regular
from vitrine.models.inputs.duck import DESCRIPTORS, connect, literal

FEATURES, IMAGES, REFERENCES = CARD_FILES
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 16  # in a card's histogram, of equal width from 0 to the largest |activation|

Reading = Literal["cls", "patches"]
# Why a feature has no label: it fires on too few images, or too many, for a score, or its score is too low. Clarity and
# margin forbade labels in older bundles.
Abstention = Literal["too_few_exemplars", "score", "clarity", "margin"]


class CardsError(VitrineError, ValueError):
    """A bundle's cards cannot be read; the message names the file and the problem."""


@dataclass(frozen=True)
class Exemplar:
    """An image on which the feature fires most."""

    image: int  # row of images.parquet
    activation: float
    mask: bytes  # activation on every patch, row by row: |a| in 255ths of the card's `mask_scale`


@dataclass(frozen=True)
class Coactive:
    """Another feature that fires at [CLS] on the same images."""

    layer: int
    index: int
    jaccard: float  # images on which both fire / images on which either fires


@dataclass(frozen=True)
class Card:
    """Everything known about one feature. Shares and scores lie between 0 and 1 (cosines: -1 and 1)."""

    layer: int
    index: int
    read_at: Reading
    frequency_cls: float  # share of images on which it fires at [CLS]
    frequency_patches: float  # share of patches on which it fires
    quantiles: list[float]  # of its activation where it fires, at `QUANTILES`; empty if it never does
    largest: float  # |activation|; 0 if it never fires
    histogram: list[int]  # number of images in each of `BINS`; empty if it never fires
    exemplars: list[Exemplar]  # largest |activation| first
    mask_scale: float
    mean_picture: bytes | None  # WebP, the exemplars' mean
    label: str | None  # what it fires on
    abstained: Abstention | None  # why there is no label
    label_score: float | None  # of the label as a predictor of firing, on the exemplar images: AUROC (older: a cosine)
    label_margin: float | None  # that score minus the runner-up's
    label_clarity: float | None  # mean cosine between pairs of exemplars, centred
    label_auroc: float | None  # the same on held-out images; None: unknown
    writes: str | None  # the label to which its direction adds most
    writes_score: float | None  # cosine between its folded direction and that label
    writes_margin: float | None
    coactive: list[Coactive]


@dataclass(frozen=True)
class CardImage:
    """An image that cards refer to."""

    name: str
    class_name: str
    picture: bytes | None  # WebP thumbnail


@dataclass(frozen=True)
class SearchHit:
    """One result of a feature search."""

    layer: int
    index: int
    label: str | None
    label_score: float | None
    label_auroc: float | None
    frequency_cls: float


class Cards:
    """The cards of a bundle. Thread-safe. Two files stay open until `close`, or until the object is no longer used.

    Args:
        bundle: the bundle's directory.
        features: their numbers by layer. Raises `CardsError` unless there is one row per feature, and every row can be
            answered with (`cards_check`).
        folder: of the cards.
        open_file: opens a file of the bundle by its name; default: whatever is at that path.
    """

    def __init__(
        self,
        bundle: Path,
        features: Sequence[int],
        folder: str = CARDS["clt"],
        open_file: Callable[[str], BinaryIO] | None = None,
    ) -> None:
        self.path, self.features = bundle / folder, np.array(features)
        self._offsets = (self.features.cumsum() - self.features).tolist()  # of the layers' first features
        open_file = open_file or (lambda name: open_regular(bundle / name))  # not kept: it may belong to who keeps us
        self._descriptors: dict[str, int] = {}
        self._closing = weakref.finalize(self, _close, self._descriptors)
        try:
            for name in (FEATURES, IMAGES):
                with open_file(f"{folder}/{name}") as stream:
                    self._descriptors[name] = os.dup(stream.fileno())
            references = open_file(f"{folder}/{REFERENCES}")
        except OSError as error:
            raise CardsError(f"{self.path} cannot be read: {error}") from error
        with references:
            self._database, self._lock = _connect(bundle), threading.Lock()
            rows = self._rows(f"SELECT label, label_score FROM {self._table(FEATURES)} ORDER BY layer, index")  # noqa: S608
            if len(rows) != sum(features):
                raise CardsError(
                    f"{self.path / FEATURES} has {len(rows):,} rows for {sum(features):,} features in "
                    f"{len(features)} layers"
                )
            self.references = self._references(references)
        tables = self._table(FEATURES), self._table(IMAGES)
        self._check(IMAGES, image_checks(tables[1], len(self.references[0])))
        self._check(FEATURES, feature_checks(*tables, features, BINS, len(QUANTILES)))
        self._labels: list[tuple[str | None, float | None]] = [
            (label, score if label else None) for label, score in rows
        ]

    def close(self) -> None:
        """Close the tables. What is asked later raises `CardsError`."""
        with self._lock:  # not under a query
            self._database.close()
            self._closing()

    def label(self, layer: int, index: int) -> tuple[str | None, float | None]:
        """(label, label score) of a feature, from memory."""
        return self._labels[self._offsets[layer] + index]

    def card(self, layer: int, index: int) -> Card:
        """The card of a feature. Raises `KeyError` if there is no such feature."""
        query = f"SELECT * FROM {self._table(FEATURES)} WHERE layer = ? AND index = ?"  # noqa: S608
        rows = self._rows(query, [layer, index], named=True)
        if not rows:
            raise KeyError((layer, index))
        fields = rows[0]
        fields["exemplars"] = [Exemplar(**exemplar) for exemplar in fields["exemplars"]]
        fields["coactive"] = [Coactive(**other) for other in fields["coactive"]]
        return Card(**fields)

    def images(self, numbers: Sequence[int]) -> list[CardImage]:
        """Rows of images.parquet, in the requested order. Raises `CardsError` if one is missing."""
        if not numbers:
            return []
        query = f"SELECT image, name, class_name, picture FROM {self._table(IMAGES)} WHERE image IN ?"  # noqa: S608
        images = {image: CardImage(*fields) for image, *fields in self._rows(query, [list(set(numbers))])}
        if missing := set(numbers) - set(images):
            raise CardsError(f"{self.path / IMAGES} has no image {min(missing)}, which a card refers to")
        return [images[number] for number in numbers]

    def search(self, text: str | None, layer: int | None, offset: int, limit: int) -> tuple[int, list[SearchHit]]:
        """(count of labelled features whose label contains `text`, up to `limit` of them from `offset`, best first)."""
        where, values = "label IS NOT NULL", list[Any]()
        if text is not None:
            where, values = where + " AND contains(lower(label), lower(?))", [*values, text]
        if layer is not None:
            where, values = where + " AND layer = ?", [*values, layer]
        table = self._table(FEATURES)
        [(total,)] = self._rows(f"SELECT count(*) FROM {table} WHERE {where}", values)  # noqa: S608
        rows = self._rows(
            f"SELECT layer, index, label, label_score, label_auroc, frequency_cls FROM {table} WHERE {where} "  # noqa: S608
            "ORDER BY label_score DESC, layer, index LIMIT ? OFFSET ?",
            [*values, limit, offset],
        )
        return total, [SearchHit(*row) for row in rows]

    def similarities(
        self, layer: int, indices: NDArray[np.integer], values: NDArray[np.floating]
    ) -> NDArray[np.float32]:
        """Cosine [N] between a code at [CLS] (features, activations [k]) and that of each reference image, in one
        layer; 0 for an image without active features."""
        query = np.zeros(self.features[layer], np.float32)
        query[indices[values != 0]] = values[values != 0]
        reference_indices, reference_values = (part[:, layer] for part in self.references)
        reference_values = reference_values.astype(np.float32)
        norms = np.linalg.norm(reference_values, axis=1) * np.linalg.norm(query)
        return (query[reference_indices] * reference_values).sum(1) / np.where(norms > 0, norms, 1)

    def _references(self, stream: BinaryIO) -> tuple[NDArray[np.integer], NDArray[np.floating]]:
        """Codes at [CLS] of the reference images: features and activations [N, L, k]."""
        file = self.path / REFERENCES
        try:
            with np.load(stream, allow_pickle=False) as stored:
                indices, values = stored["indices"], stored["values"]
        except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
            raise CardsError(f"{file} cannot be used: {error}") from error
        if indices.shape != values.shape or indices.ndim != 3 or indices.shape[1] != len(self.features):
            raise CardsError(f"{file}: codes of shapes {indices.shape} and {values.shape} do not fit the bundle")
        if not np.issubdtype(indices.dtype, np.integer) or not np.issubdtype(values.dtype, np.floating):
            raise CardsError(f"{file}: indices are {indices.dtype}, values {values.dtype}")
        if (indices < 0).any() or (indices >= self.features[:, None]).any():
            raise CardsError(f"{file} names a feature that does not exist")
        if not is_finite(values):
            raise CardsError(f"{file} has values that are not finite")
        return indices, values

    def _check(self, name: str, checks: Mapping[str, str]) -> None:
        for problem, query in checks.items():
            [(count,)] = self._rows(query)
            if count > 0:
                raise CardsError(f"{self.path / name} has {problem}: {count:,}")

    def _table(self, name: str) -> str:
        """A table as SQL: by its descriptor, or by its path if that is still the same file."""
        file, descriptor = self.path / name, self._descriptors.get(name)
        if descriptor is None:
            raise CardsError(f"{file} is closed: its bundle is no longer in service")
        if DESCRIPTORS.is_dir():
            return f"read_parquet('{DESCRIPTORS}/{descriptor}', hive_partitioning = false)"
        try:
            same = Identity.of(file.stat()) == Identity.of(os.fstat(descriptor))
        except OSError:
            same = False
        if not same:
            raise CardsError(f"{file} was replaced while its bundle was in service; load the bundle again")
        quoted = literal(file).replace("'", "''")
        return f"read_parquet('{quoted}', hive_partitioning = false)"

    def _rows(self, query: str, values: Sequence[Any] = (), named: bool = False) -> list[Any]:
        try:
            with self._lock:
                result = self._database.execute(query, values)
                rows = result.fetchall()
                names = [column[0] for column in result.description or ()]
        except duckdb.Error as error:
            raise CardsError(f"{self.path} cannot be read: {error}") from error
        return [dict(zip(names, row, strict=True)) for row in rows] if named else rows


def _connect(bundle: Path) -> duckdb.DuckDBPyConnection:
    try:
        database = connect()
        database.execute("SET parquet_metadata_cache = true")  # the files never change: halves the time per row
    except duckdb.Error as error:
        raise CardsError(f"DuckDB, which reads the cards of {bundle}, cannot be started: {error}") from error
    return database


def _close(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
