"""The tables that a bulk run writes, one part at a time, each part atomically.

    part-000000.parquet         a row per answered image: `Row`
    _errors/part-000000.parquet a row per image that could not be answered: `Problem`; only if there are any

Readers of a folder (pandas, pyarrow, Spark) pass over what begins with an underscore or a dot. Each file is written
under a hidden name, flushed to disk and renamed. A part's errors are written first and its rows last, even if there are
none: a part is done when its rows exist, and then its errors exist, too.

DuckDB writes them from lines of JSON: it is installed anyway, for the cards, and pyarrow would be 170 MB more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.files.problems import naming
from vitrine.models.files.writing import temporary, written
from vitrine.models.images.decode import Note
from vitrine.models.inputs.duck import READ_PARQUET, connect, literal
from vitrine.service.answers.explain import account, predict
from vitrine.service.answers.notices import unlike_labels
from vitrine.service.engine.labels import LabelSet
from vitrine.service.schemas.attribute import Explain, Feature, Fidelity, LedgerAccount
from vitrine.service.schemas.classify import Prediction
from vitrine.service.schemas.sources import SourceAccount

ERRORS = "_errors"
ERRORS_BEFORE = "errors"  # in folders that were begun when this was its name
_PART = re.compile(r"part-(\d{6,})\.parquet")


class Ledger(LedgerAccount):
    """The ledger of the top-1."""

    target: str
    logit: float


class LayerFeature(Feature):
    """A feature of any layer."""

    layer: int


class Sources(BaseModel):
    """The source account of the top-1, in short."""

    logit: float
    features: list[LayerFeature] = Field(description="summed over all tokens, largest |contribution| first")
    error_share: float
    remainder: float


class Row(BaseModel):
    """One image's answer."""

    id: int = Field(description="number of the input")
    name: str
    predictions: list[Prediction]
    ledger: Ledger
    features: list[LayerFeature] = Field(description="features of all layers, largest |contribution| first")
    fidelity: Fidelity | None = Field(description="null in a bundle without a CLT")
    warnings: list[str] = Field(description="codes of the warnings about this image")
    sources: Sources | None = Field(default=None, description="only if requested; otherwise there is no such column")
    edited: bool | None = Field(
        default=None, description="whether the run's edit was applied; without an edit there is no such column"
    )


class Problem(BaseModel):
    """One image that could not be answered."""

    id: int
    name: str
    code: str = Field(description="the service's error code; `unreadable`: the file could not be read")
    message: str


_PREDICTION = "STRUCT(label VARCHAR, probability DOUBLE, logit DOUBLE, cosine DOUBLE)"
_LEDGER = (
    "STRUCT(target VARCHAR, logit DOUBLE, prior DOUBLE, attention DOUBLE[], clt DOUBLE[], mlp DOUBLE[], bias DOUBLE, "
    "error DOUBLE, edit DOUBLE, remainder DOUBLE)"
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
    "warnings": "VARCHAR[]",
}
SOURCES_TYPES = {
    "sources": f"STRUCT(logit DOUBLE, features {_FEATURE}[], error_share DOUBLE, remainder DOUBLE)",
}
EDITED_TYPES = {"edited": "BOOLEAN"}
# Of folders that were begun when these had fewer fields (`job.COLUMNS`).
FIRST_TYPES = {
    "predictions": "STRUCT(label VARCHAR, probability DOUBLE, logit DOUBLE)[]",
    "ledger": "STRUCT(target VARCHAR, logit DOUBLE, prior DOUBLE, attention DOUBLE[], clt DOUBLE[], bias DOUBLE, "
    "error DOUBLE, remainder DOUBLE)",
}
PROBLEM_TYPES = {"id": "BIGINT", "name": "VARCHAR", "code": "VARCHAR", "message": "VARCHAR"}


def row_types(with_sources: bool, with_edit: bool, columns: int) -> dict[str, str]:
    """The columns of a run's rows. columns: of its job."""
    first = FIRST_TYPES if columns == 1 else {}
    return ROW_TYPES | first | (SOURCES_TYPES if with_sources else {}) | (EDITED_TYPES if with_edit else {})


def row(
    number: int,
    name: str,
    parts: Decomposition,
    labels: LabelSet,
    bundle: Bundle,
    top_k: int,
    count: int,
    notes: Sequence[Note] = (),
    sources: Sources | None = None,
    edited: bool | None = None,
) -> str:
    """A `Row` as JSON. count: features listed, over all layers."""
    optional = {"sources": sources, "edited": edited}
    predictions = predict(parts, labels, bundle.manifest.logit_scale, top_k)
    (explanation,), fidelity = account(parts, labels, bundle, Explain(features=count))
    # the first `count` of all layers are among the first `count` of each
    features = [(layer.layer, feature) for layer in explanation.layers for feature in layer.features]
    features.sort(key=lambda pair: -abs(pair[1].contribution))
    return Row.model_construct(
        id=number,
        name=name,
        predictions=predictions,
        ledger=Ledger.model_construct(target=explanation.target, logit=explanation.logit, **vars(explanation.ledger)),
        features=[LayerFeature.model_construct(layer=layer, **vars(feature)) for layer, feature in features[:count]],
        fidelity=fidelity,
        warnings=[note.code for note in (*notes, *unlike_labels(bundle.manifest.text.fit, predictions))],
        sources=sources,
        edited=edited,
    ).model_dump_json(exclude={name for name, value in optional.items() if value is None})


def short_sources(account: SourceAccount) -> Sources:
    """Without the parts by token and by layer: of a million images they would be most of the table."""
    return Sources.model_construct(
        logit=account.logit,
        features=[
            LayerFeature.model_construct(**feature.model_dump(exclude={"tokens"})) for feature in account.features
        ],
        error_share=account.error_share,
        remainder=account.remainder,
    )


def write_part(
    out: Path, part: int, rows: Iterable[str], problems: Iterable[str], types: Mapping[str, str] = ROW_TYPES
) -> None:
    """Write a part from rows and problems as JSON, in the order of their inputs. The part is done afterwards.

    types: the rows' columns (`row_types`).
    """
    name, problems = f"part-{part:06}.parquet", list(problems)
    errors = out / ERRORS / name
    if problems:
        with naming(errors.parent):
            errors.parent.mkdir(exist_ok=True)
        _write(errors, problems, PROBLEM_TYPES)
    else:  # left by a run that was killed between the two writes, and whose images have been repaired since
        errors.unlink(missing_ok=True)
    _write(out / name, rows, types)


def done_parts(out: Path) -> set[int]:
    """Numbers of the parts that are done."""
    return {int(match[1]) for path in out.iterdir() if (match := _PART.fullmatch(path.name))}


def remove_partial_files(out: Path) -> None:
    """Remove partial files left by a killed run. No other run may be writing there."""
    for pattern in ("._job.json.*", ".job.json.*", ".part-*", f"{ERRORS}/.part-*"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def count(out: Path) -> tuple[int, int]:
    """(rows, problems) of all parts."""
    rows, problems = (_select("count(*)", folder) for folder in (out, out / ERRORS))
    return (rows[0][0] if rows else 0), (problems[0][0] if problems else 0)


def count_by_code(out: Path) -> dict[str, int]:
    """Problems of all parts by their code, the most frequent first."""
    return dict(_select("code, count(*) AS n", out / ERRORS, "GROUP BY code ORDER BY n DESC, code"))


def count_warnings(out: Path) -> dict[str, int]:
    """Rows of all parts by the code of their warnings, the most frequent first."""
    return dict(_select("unnest(warnings) AS code, count(*) AS n", out, "GROUP BY code ORDER BY n DESC, code"))


def _select(columns: str, folder: Path, rest: str = "") -> list[Any]:
    """Rows of a query over the parts in a folder; none if there are no parts."""
    files = [literal(path) for path in sorted(folder.glob("part-*.parquet"))]
    if not files:
        return []
    with connect() as database:
        query = f"SELECT {columns} FROM {READ_PARQUET} {rest}"  # noqa: S608
        return database.execute(query, [files]).fetchall()


def _write(file: Path, lines: Iterable[str], types: Mapping[str, str]) -> None:
    with written(file, shared=True) as partial:
        json = temporary(file, shared=True)
        try:
            json.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            with connect() as database:
                table = database.read_json(
                    literal(json), columns=dict(types), format="newline_delimited", hive_partitioning=False
                )
                table.write_parquet(str(partial), compression="zstd")
        finally:
            json.unlink(missing_ok=True)
