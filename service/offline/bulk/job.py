"""The definition of a bulk run, `_job.json` beside its output: a resume must match it, or the output would be mixed.

How the run is executed (batches, threads, Ray) is not part of it: answers are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.label_sets import DEFAULT, read_label_sets
from vitrine.models.files.locks import lock
from vitrine.models.files.names import display
from vitrine.models.files.problems import naming
from vitrine.models.files.writing import create, prepare_folder
from vitrine.models.inputs.source import Source
from vitrine.service.answers.explain import check_edited
from vitrine.service.answers.sources import check_sources
from vitrine.service.engine.edits import named_edit
from vitrine.service.engine.runtime import choose
from vitrine.service.errors import ServiceError
from vitrine.service.offline.bulk.errors import BulkError
from vitrine.service.offline.bulk.tables import ERRORS, ERRORS_BEFORE
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import AttributeRequest

FILE = "_job.json"
FILE_BEFORE = "job.json"  # in folders that were begun when this was its name
FORMAT = 2  # of _job.json, and of how images are numbered; 1: links were left out, rows had no warnings
COLUMNS = 2  # of rows; 1: predictions had no cosine, ledgers neither `mlp` nor `edit`
_SHOWN_CHARACTERS = 60  # characters shown of a differing value


class Inputs(BaseModel):
    kind: str
    path: str
    column: str | None
    images: int
    digest: str


class Job(BaseModel):
    """Everything that an answer, or its place in the output, depends on."""

    format: int = 1
    bundle: str  # digest
    precision: str
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    inputs: Inputs
    top_k: int
    features: int
    part_size: int
    max_image_pixels: int
    max_image_side: int
    max_jpeg_pixels: int = 0
    # Absent in folders that were begun before there were source accounts; these are taken up as they are.
    sources: int = 0  # features listed of the source account; 0: none is made
    baseline: Literal["zero", "mean"] = "zero"
    edit: str | None = None  # its name
    edit_digest: str | None = None
    columns: int = 1  # see `COLUMNS`; a folder keeps those that it was begun with

    @property
    def parts(self) -> int:
        """Number of parts; the last one may be smaller."""
        return -(-self.inputs.images // self.part_size)

    def bounds(self, part: int) -> tuple[int, int]:
        """Numbers of a part's first image and of the one after its last."""
        return part * self.part_size, min((part + 1) * self.part_size, self.inputs.images)


def make_job(
    bundle: Bundle,
    settings: Settings,
    source: Source,
    request: AttributeRequest,
    *,
    path: str,
    column: str | None = None,
    part_size: int = 512,
) -> Job:
    """The job of answering `request` for every image of `source`, which was opened as `path` and `column`.

    Raises `ServiceError` for an unknown label set or edit, and for sources that the bundle does not have or that an
    edit excludes, `EngineError` for a precision that it does not have.
    """
    if (edit := named_edit(bundle, settings, request.edit)) is not None:
        check_edited(request.explain)
    check_sources(request.explain, bundle, enabled=settings.sources)
    labels, templates = _texts(bundle, settings, request)
    return Job(
        format=FORMAT,
        bundle=bundle.digest,
        precision=choose(bundle, settings).precision,
        labels=labels,
        templates=templates,
        inputs=Inputs(
            kind=source.kind,
            path=display(Path(path).resolve()),
            column=column,
            images=len(source),
            digest=source.digest(),
        ),
        top_k=request.top_k,
        features=request.explain.features,
        part_size=part_size,
        max_image_pixels=settings.max_image_pixels,
        max_image_side=settings.max_image_side,
        max_jpeg_pixels=settings.max_jpeg_pixels,
        sources=request.explain.source_features if request.explain.sources else 0,
        baseline=request.explain.baseline,
        edit=edit.name if edit else None,
        edit_digest=edit.digest if edit else None,
        columns=COLUMNS,
    )


@contextmanager
def lock_output(out: Path, job: Job) -> Iterator[tuple[bool, Job]]:
    """Lock `out` for this job, exclusively. It is created if it does not exist, else resumed.

    Yields (whether it is locked, the job as it was begun). Where the file system has no locks another run may write
    there, too: of the same job, so that its parts are the same, but its unfinished files must be left alone.

    Raises:
        BulkError: it was started with other options, another run is using it, or it contains something else.
        FileError: it cannot be written.
    """
    if Path(display(out.resolve())).is_relative_to(job.inputs.path):
        raise BulkError(f"{out} is in the input folder {job.inputs.path}; write to another folder")
    with naming(out):
        jobs = [out / name for name in (FILE, FILE_BEFORE) if (out / name).exists()]
        if out.is_dir() and not jobs and any(not path.name.startswith(".") for path in out.iterdir()):
            raise BulkError(
                f"{out} is not empty and has no {FILE}; give a new folder, or the folder of a run to resume"
            )
        prepare_folder(out)
        file = (out / ".lock").open("w")
    with file:
        with naming(out):
            try:
                locked = lock(file)
            except BlockingIOError as error:
                raise BulkError(f"another run is writing to {out}; wait for it, or write to another folder") from error
        existing = _create_or_resume(jobs[0] if jobs else out / FILE, job)
        for before, now in ((FILE_BEFORE, FILE), (ERRORS_BEFORE, ERRORS)):
            _rename(out / before, out / now)
        yield locked, existing


def _rename(before: Path, now: Path) -> None:
    """Give what an earlier version wrote the present name. Without locks another run may do so at the same time."""
    with naming(now):
        if before.exists() and not now.exists():
            with suppress(FileNotFoundError):
                before.rename(now)


def _create_or_resume(file: Path, job: Job) -> Job:
    """The job as it was begun, with the columns of then."""
    if not file.exists() and create(file, job.model_dump_json(indent=2) + "\n"):
        return job
    try:
        existing = Job.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise BulkError(
            f"{file} is not from this version: {error.errors()[0]['msg']}; write to another folder"
        ) from error
    if existing.format != FORMAT:
        raise BulkError(
            f"{file.parent} was started by another version of Vitrine, which numbered images differently; finish it "
            "with that version, or write to another folder"
        )
    job = job.model_copy(update={"columns": min(existing.columns, COLUMNS)})
    if differences := _differences(_flat(existing), _flat(job)):
        raise BulkError(
            f"{file.parent} was started with other options: {'; '.join(differences)}. Give the same options to resume "
            "it, or write to another folder"
        )
    return existing


def _flat(job: Job) -> dict[str, Any]:
    fields = job.model_dump()
    return fields | {f"inputs.{name}": value for name, value in fields.pop("inputs").items()}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [f"{name} was {_short(old[name])} and is now {_short(new[name])}" for name in new if old[name] != new[name]]


def _short(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, tuple) else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _texts(bundle: Bundle, settings: Settings, request: AttributeRequest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(labels, templates), defaults filled in. The service's limits on requests do not apply here."""
    text = bundle.manifest.text
    named = {name: label_set for name, (label_set, _) in bundle.label_sets.items()}
    if settings.label_sets:
        named |= read_label_sets(settings.label_sets)
    if request.labels is not None and request.label_set is not None:
        raise ServiceError("invalid_request", "labels and a label set cannot be used together; give one of them")
    labels, templates = text.labels, text.templates
    if (name := request.label_set or DEFAULT) != DEFAULT:
        if name not in named:
            raise ServiceError(
                "unknown_label_set",
                f"there is no label set {name!r}; the label sets are: {', '.join([DEFAULT, *named])}",
            )
        labels, templates = named[name].labels, named[name].templates or templates
    if request.templates is not None:
        templates = tuple(request.templates)
    return tuple(request.labels or labels), tuple(templates)
