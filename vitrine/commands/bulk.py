"""`vitrine bulk`: many images into Parquet tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitrine.commands.common import (
    INPUTS,
    PLAIN,
    Baseline,
    BundlePath,
    EditName,
    LabelSet,
    LabelsFile,
    LabelsList,
    SkipBroken,
    SourceBaseline,
    TemplateList,
    chosen_labels,
    new_console,
    open_bundle_or_default,
    print_skipped,
    print_warnings,
)
from vitrine.models.stopping import advising


def bulk(
    inputs: Annotated[str, typer.Argument(help=INPUTS)],
    out: Annotated[Path, typer.Option(help="Folder of Parquet parts; a run found there is taken up.")],
    column: Annotated[str | None, typer.Option(help="Of Parquet inputs: image bytes, or paths.")] = None,
    labels: LabelsList = None,
    labels_file: LabelsFile = None,
    label_set: LabelSet = None,
    template: TemplateList = None,
    strict: Annotated[bool, typer.Option(help="Refuse labels that are cut, the same or unknown to the CLIP.")] = False,
    top_k: Annotated[int, typer.Option(min=1, help="Predictions listed.")] = 5,
    features: Annotated[int, typer.Option(min=0, help="Features listed, of all layers together.")] = 5,
    sources: Annotated[
        int, typer.Option(min=0, help="Features listed of a source account, of all layers; 0: no such account.")
    ] = 0,
    baseline: Baseline = SourceBaseline.zero,
    edit: EditName = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: VITRINE_BATCH_SIZE.")] = None,
    part_size: Annotated[int, typer.Option(min=1, help="Images in one Parquet file.")] = 512,
    ray: Annotated[int, typer.Option(min=0, help="Processes of Ray's (vitrine\\[bulk]); 0: this one alone.")] = 0,
    skip_broken_shards: SkipBroken = False,
    bundle: BundlePath = None,
) -> None:
    """Account for many images, without a server: Parquet tables. Run it again to take up a run that was cut off.

    At the end it says how many were answered, failed, or left out, and exits with 1 if none was answered.
    """
    from vitrine.models.files.names import printable
    from vitrine.models.inputs.opening import open_inputs
    from vitrine.service.answers.notices import refuse
    from vitrine.service.answers.sources import check_sources
    from vitrine.service.engine.labels import bundle_notices
    from vitrine.service.offline.bulk.errors import BulkError
    from vitrine.service.offline.bulk.job import make_job
    from vitrine.service.offline.bulk.run import bulk as run
    from vitrine.service.offline.bulk.tables import ERRORS, count_by_code, count_warnings
    from vitrine.service.offline.bulk.work import Work
    from vitrine.service.operations.settings import load_settings
    from vitrine.service.schemas.attribute import AttributeRequest
    from vitrine.service.schemas.base import validated

    fields: dict[str, Any] = {"label_set": label_set, "templates": template, "top_k": top_k, "edit": edit}
    explain = {"features": features, "sources": sources > 0, "source_features": sources, "baseline": baseline.value}
    fields |= {"explain": explain, "labels": chosen_labels(labels, labels_file)}
    request, settings = validated(AttributeRequest, fields), load_settings()
    opened, console = open_bundle_or_default(bundle), new_console()
    if batch_size is not None:
        settings = settings.model_copy(update={"batch_size": batch_size})
    check_sources(request.explain, opened, enabled=settings.sources)  # before inputs are listed, which may take long
    source = open_inputs(inputs, column, skip_broken_shards)
    job = make_job(opened, settings, source, request, path=inputs, column=column, part_size=part_size)
    notices = bundle_notices(opened, job.labels, job.templates)
    if strict:
        refuse(notices, "labels")
    print_warnings((notice.message for notice in notices), console)
    with advising("the same command goes on with the images that are left"):
        summary = run(opened, Work(job, source, out, settings), console, ray)
    if summary.problems:
        codes = ", ".join(f"{count:,} {code}" for code, count in count_by_code(out).items())
        console.print(f"errors: {codes}", style="yellow", highlight=False, soft_wrap=True)
    if noted := count_warnings(out):
        codes = ", ".join(f"{count:,} {code}" for code, count in noted.items())
        console.print(f"warnings: {codes}", style="yellow", highlight=False, soft_wrap=True)
    print_skipped(source.skipped, console)
    console.print(f"{summary.rows:,} rows and {summary.problems:,} errors in {out}", **PLAIN)
    if not summary.rows:
        raise BulkError(f"no image of {printable(inputs)} was answered; {out / ERRORS} says why")
