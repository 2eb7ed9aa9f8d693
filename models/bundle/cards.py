"""Feature cards: what a feature fires on, in words, numbers and pictures. A bundle may hold them under cards/.

    features.parquet   a row a feature, by layer and index: the fields of `Card`
    images.parquet     a row an image that cards and retrieval name: the fields of `CardImage`
    references.npz     for retrieval, codes at [CLS] of the first N of those images: `indices` and `values` [N, L, k],
                       0 in places not in use

Written by `vitrine cards` (training/cards). The Parquet tables are read with DuckDB, a row at a time, so that those of
a large CLT stay on disk. No torch.

A feature is *read* at [CLS], which is where answers explain it, or, if it hardly ever fires there, at the patches: its
activation on an image is that at [CLS], or the largest over patches. Exemplars, quantiles, histogram and label are all
of that reading.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import duckdb
import numpy as np
from numpy.typing import NDArray

from vitrine.models.bundle.layout import CARDS
from vitrine.models.errors import VitrineError

FEATURES, IMAGES, REFERENCES = CARDS
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 16  # of a card's histogram, of equal width from 0 to its largest |activation|

Reading = Literal["cls", "patches"]
# Why a feature has no label, in the order in which it is asked.
Abstention = Literal["too_few_exemplars", "score", "clarity", "margin"]


class CardsError(VitrineError, ValueError):
    """A bundle's cards cannot be read; the message names the file and the mistake."""


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
    jaccard: float  # images on which both fire, as a part of those on which one does


@dataclass(frozen=True)
class Card:
    """What is known of one feature. Shares and scores lie between 0 and 1 (cosines: -1 and 1)."""

    layer: int
    index: int
    read_at: Reading
    frequency_cls: float  # share of images on which it fires at [CLS]
    frequency_patches: float  # share of patches on which it fires
    quantiles: list[float]  # of its activation where it fires, at `QUANTILES`; empty if it never does
    largest: float  # |activation|; 0 if it never fires
    histogram: list[int]  # images in each of `BINS`; empty if it never fires
    exemplars: list[Exemplar]  # largest |activation| first
    mask_scale: float
    mean_picture: bytes | None  # WebP, the exemplars' mean
    label: str | None  # what it fires on
    abstained: Abstention | None  # why there is no label
    label_score: float | None  # mean cosine of an exemplar and the label, both centred
    label_margin: float | None  # that score minus the runner-up's
    label_clarity: float | None  # mean cosine of any two exemplars, centred
    label_auroc: float | None  # how well the label tells the images on which it fires, on held-out ones; None: unknown
    writes: str | None  # the label that its direction adds most to
    writes_score: float | None  # cosine of its folded direction and that label
    writes_margin: float | None
    coactive: list[Coactive]


@dataclass(frozen=True)
class CardImage:
    """An image that cards name."""

    name: str
    class_name: str
    picture: bytes | None  # WebP thumbnail


@dataclass(frozen=True)
class Found:
    """One line of a search for features."""

    layer: int
    index: int
    label: str | None
    label_score: float | None
    label_auroc: float | None
    frequency_cls: float


class Cards:
    """The cards of a bundle. Thread-safe.

    Args:
        path: the bundle's directory.
        layers, features: the bundle's shape. Raises `CardsError` unless there is a row for each feature.
    """

    def __init__(self, path: Path, layers: int, features: int) -> None:
        self.path, self.layers, self.features = path, layers, features
        # No extension is ever fetched, and one thread is plenty for rows of a small file.
        settings = {"threads": 1, "autoinstall_known_extensions": False, "autoload_known_extensions": False}
        self._database = duckdb.connect(config=settings)  # type: ignore[arg-type]
        self._database.execute("SET parquet_metadata_cache = true")  # the files never change: half the time of a row
        self._lock = threading.Lock()
        rows = self._rows(f"SELECT label, label_score FROM {self._table(FEATURES)} ORDER BY layer, index")  # noqa: S608
        if len(rows) != layers * features:
            raise CardsError(f"{path / FEATURES} has {len(rows):,} rows for {layers} layers of {features:,} features")
        self.references = self._references()
        [(images,)] = self._rows(f"SELECT count(*) FROM {self._table(IMAGES)}")  # noqa: S608
        if images < len(self.references[0]):
            raise CardsError(f"{path / IMAGES} has {images:,} rows for {len(self.references[0]):,} reference images")
        self._labels: list[tuple[str | None, float | None]] = [
            (label, score if label else None) for label, score in rows
        ]

    def label(self, layer: int, index: int) -> tuple[str | None, float | None]:
        """(label, its score) of a feature, from memory."""
        return self._labels[layer * self.features + index]

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
        """Rows of images.parquet, in the order asked for. Raises `CardsError` if one is not there."""
        if not numbers:
            return []
        query = f"SELECT image, name, class_name, picture FROM {self._table(IMAGES)} WHERE image IN ?"  # noqa: S608
        found = {image: CardImage(*fields) for image, *fields in self._rows(query, [list(set(numbers))])}
        if missing := set(numbers) - set(found):
            raise CardsError(f"{self.path / IMAGES} has no image {min(missing)}, which a card names")
        return [found[number] for number in numbers]

    def search(self, text: str | None, layer: int | None, offset: int, limit: int) -> tuple[int, list[Found]]:
        """(how many labelled features there are whose label contains `text`, those from `offset` on, best first)."""
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
        return total, [Found(*row) for row in rows]

    def similarities(
        self, layer: int, indices: NDArray[np.integer], values: NDArray[np.floating]
    ) -> NDArray[np.float32]:
        """Cosine [N] of a code at [CLS] (features, activations [k]) and each reference image's, in one layer; 0 for an
        image without any active feature."""
        query = np.zeros(self.features, np.float32)
        query[indices[values != 0]] = values[values != 0]
        of_indices, of_values = (part[:, layer] for part in self.references)
        stored = of_values.astype(np.float32)
        norms = np.linalg.norm(stored, axis=1) * np.linalg.norm(query)
        return (query[of_indices] * stored).sum(1) / np.where(norms > 0, norms, 1)

    def _references(self) -> tuple[NDArray[np.integer], NDArray[np.floating]]:
        """Codes at [CLS] of the reference images: features and activations [N, L, k]."""
        file = self.path / REFERENCES
        try:
            with np.load(file, allow_pickle=False) as stored:
                indices, values = stored["indices"], stored["values"]
        except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
            raise CardsError(f"{file} cannot be used: {error}") from error
        if indices.shape != values.shape or indices.ndim != 3 or indices.shape[1] != self.layers:
            raise CardsError(f"{file}: codes {indices.shape}, {values.shape} do not fit")
        if indices.size and int(indices.max()) >= self.features:
            raise CardsError(f"{file} names a feature beyond the {self.features:,} there are")
        return indices, values

    def _table(self, name: str) -> str:
        quoted = str(self.path / name).replace("'", "''")
        return f"read_parquet('{quoted}')"

    def _rows(self, query: str, values: Sequence[Any] = (), named: bool = False) -> list[Any]:
        try:
            with self._lock:
                found = self._database.execute(query, values)
                rows = found.fetchall()
                names = [column[0] for column in found.description or ()]
        except duckdb.Error as error:
            raise CardsError(f"{self.path / 'cards'} cannot be read: {error}") from error
        return [dict(zip(names, row, strict=True)) for row in rows] if named else rows
