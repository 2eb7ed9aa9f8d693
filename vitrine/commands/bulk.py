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
    out: Annotated[Path, typer.Option(help="Folder for the Parquet files; a run found there is resumed.")],
    column: Annotated[
        str | None, typer.Option(help="With Parquet files: the column of image bytes, or of paths.")
    ] = None,
    labels: LabelsList = None,
    labels_file: LabelsFile = None,
    label_set: LabelSet = None,
    template: TemplateList = None,
    strict: Annotated[
        bool, typer.Option(help="Refuse labels that this CLIP would cut, cannot distinguish or does not know.")
    ] = False,
    top_k: Annotated[int, typer.Option(min=1, help="Number of predictions listed.")] = 5,
    features: Annotated[int, typer.Option(min=0, help="Number of features listed, over all layers.")] = 5,
    sources: Annotated[
        int,
        typer.Option(
            min=0, help="Number of features listed of the source account, over all layers; 0: no such account."
        ),
    ] = 0,
    baseline: Baseline = SourceBaseline.zero,
    edit: EditName = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Number of images per batch; default: VITRINE_BATCH_SIZE.")
    ] = None,
    part_size: Annotated[int, typer.Option(min=1, help="Number of images in one Parquet file.")] = 512,
    ray: Annotated[
        int, typer.Option(min=0, help="Number of Ray processes (vitrine\\[bulk]); 0: only this process.")
    ] = 0,
    skip_broken_shards: SkipBroken = False,
    bundle: BundlePath = None,
) -> None:
    """Write accounts of many images to Parquet tables, without a server. Run it again to resume an interrupted run.

    At the end it prints how many images were answered, failed or were left out; it exits with 1 if none was answered.
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
    with advising("run the same command again to continue with the remaining images"):
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
