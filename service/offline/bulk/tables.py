"""The tables that a bulk run writes, a part at a time, and how a part comes to lie there whole or not at all.

    part-000000.parquet         a row an image that was answered: `Row`
    errors/part-000000.parquet  a row an image that could not be: `Problem`; only where there are any

Each file is written under a hidden name, flushed to the disk and renamed. A part's errors come first and its rows
last, even if there are none: a part is done when its rows are there, and then its errors are there, too.

DuckDB writes them, from lines of JSON: it is installed anyway, for the cards, and pyarrow would be 170 MB more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import duckdb
from pydantic import BaseModel, Field

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.bundle import Bundle
from vitrine.service.answers.explain import account, predict
from vitrine.service.engine.labels import LabelSet
from vitrine.service.offline.bulk.inputs import DUCKDB
from vitrine.service.schemas.attribute import Explain, Feature, Fidelity, LedgerAccount
from vitrine.service.schemas.classify import Prediction

ERRORS = "errors"
_PART = re.compile(r"part-(\d{6,})\.parquet")


class Ledger(LedgerAccount):
    """Of the top-1."""

    target: str
    logit: float


class LayerFeature(Feature):
    """Of any layer."""

    layer: int


class Row(BaseModel):
    """One image's answer."""

    id: int = Field(description="number of the input")
    name: str
    predictions: list[Prediction]
    ledger: Ledger
    features: list[LayerFeature] = Field(description="of all layers, largest |contribution| first")
    fidelity: Fidelity


class Problem(BaseModel):
    """One image that could not be answered."""

    id: int
    name: str
    code: str = Field(description="as of the service's errors; `unreadable`: the file could not be read")
    message: str


_PREDICTION = "STRUCT(label VARCHAR, probability DOUBLE, logit DOUBLE)"
_LEDGER = (
    "STRUCT(target VARCHAR, logit DOUBLE, prior DOUBLE, attention DOUBLE[], clt DOUBLE[], bias DOUBLE, error DOUBLE, "
    "remainder DOUBLE)"
)
_FEATURE = (
    'STRUCT(layer INTEGER, "index" INTEGER, activation DOUBLE, contribution DOUBLE, label VARCHAR, label_score DOUBLE)'
)
_FIDELITY = "STRUCT(r2 DOUBLE, cosine DOUBLE, error_share DOUBLE, reconstructed_top1_agrees BOOLEAN)"
ROW_TYPES = {
    "id": "BIGINT",
    "name": "VARCHAR",
    "predictions": f"{_PREDICTION}[]",
    "ledger": _LEDGER,
    "features": f"{_FEATURE}[]",
    "fidelity": _FIDELITY,
}
PROBLEM_TYPES = {"id": "BIGINT", "name": "VARCHAR", "code": "VARCHAR", "message": "VARCHAR"}


def row(number: int, name: str, parts: Decomposition, labels: LabelSet, bundle: Bundle, top_k: int, count: int) -> str:
    """A `Row` as JSON. count: features listed, of all layers together."""
    predictions = predict(parts, labels, bundle.manifest.logit_scale, top_k)
    (explanation,), fidelity = account(parts, labels, bundle, Explain(features=count))
    # the first `count` of all layers are among the first `count` of each
    found = [(layer.layer, feature) for layer in explanation.layers for feature in layer.features]
    found.sort(key=lambda pair: -abs(pair[1].contribution))
    return Row.model_construct(
        id=number,
        name=name,
        predictions=predictions,
        ledger=Ledger.model_construct(target=explanation.target, logit=explanation.logit, **vars(explanation.ledger)),
        features=[LayerFeature.model_construct(layer=layer, **vars(feature)) for layer, feature in found[:count]],
        fidelity=fidelity,
    ).model_dump_json()


def write_part(out: Path, part: int, rows: Iterable[str], problems: Iterable[str]) -> None:
    """Write a part, rows and problems as JSON in the order of their inputs; after this it is done."""
    name, problems = f"part-{part:06}.parquet", list(problems)
    errors = out / ERRORS / name
    if problems:
        errors.parent.mkdir(exist_ok=True)
        _write(errors, problems, PROBLEM_TYPES)
    else:  # of a run that was killed between the two, and whose images have been mended since
        errors.unlink(missing_ok=True)
    _write(out / name, rows, ROW_TYPES)


def done_parts(out: Path) -> set[int]:
    """Numbers of the parts that are done."""
    return {int(found[1]) for path in out.iterdir() if (found := _PART.fullmatch(path.name))}


def sweep(out: Path) -> None:
    """Take away what a killed run left half written."""
    for path in [*out.glob(".part-*"), *(out / ERRORS).glob(".part-*")]:
        path.unlink(missing_ok=True)


def count(out: Path) -> tuple[int, int]:
    """(rows, problems) of all parts."""
    with duckdb.connect(config=DUCKDB) as database:  # type: ignore[arg-type]
        found = [sorted(map(str, folder.glob("part-*.parquet"))) for folder in (out, out / ERRORS)]
        rows, problems = (len(database.read_parquet(files)) if files else 0 for files in found)
    return rows, problems


def replace_durably(written: Path, file: Path) -> None:
    """Rename, so that the file is there whole or not at all, even after a power cut."""
    _flush(written)
    os.replace(written, file)
    _flush(file.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(file: Path, lines: Iterable[str], types: Mapping[str, str]) -> None:
    mark = f".{file.name}.{os.getpid()}"  # two that write the same part write the same, and not into one another
    json, parquet = file.parent / f"{mark}.json", file.parent / f"{mark}.parquet"
    json.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    with duckdb.connect(config=DUCKDB) as database:  # type: ignore[arg-type]
        table = database.read_json(str(json), columns=dict(types), format="newline_delimited")
        table.write_parquet(str(parquet), compression="zstd")
    json.unlink()
    replace_durably(parquet, file)
