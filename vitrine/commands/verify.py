"""`vitrine verify`: whether a bundle is sound, and its precisions agree on this machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vitrine.commands import completing
from vitrine.commands.common import INPUTS, new_console, print_bundle


class Choice(StrEnum):
    """A precision of the vision graph."""

    FP32 = "fp32"
    INT8 = "int8"
    FP16 = "fp16"


def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.", autocompletion=completing.bundles)],
    precision: Annotated[
        Choice | None, typer.Option(help="Also measure how well this precision agrees with float32 on this machine.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help=f"Images to measure it on; default: generated pictures, which are a weaker test. {INPUTS}"),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the agreement to this file.")] = None,
) -> None:
    """Check a bundle: every file's sha256, that its graphs run, and that the account adds up."""
    from vitrine.models.files.writing import prepare_file, write_text
    from vitrine.models.inputs.opening import open_inputs
    from vitrine.service.offline.agreement import AgreementError, agreement, print_agreement
    from vitrine.service.offline.verify import verify as run
    from vitrine.service.operations.settings import load_settings

    if precision is None and (images is not None or json_file is not None):
        raise typer.BadParameter("--images and --json require --precision")
    if json_file is not None:
        prepare_file(json_file)
    opened, console = run(bundle), new_console()
    print_bundle(opened, console)
    console.print("all files match the manifest; the graphs run and their rows add up", style="green")
    if precision is None:
        return
    inputs = open_inputs(images) if images is not None else None
    report = agreement(opened, load_settings(), precision.value, console, inputs)
    if json_file is not None:
        write_text(json_file, report.model_dump_json(indent=2) + "\n")
    print_agreement(report, console)
    if report.problem:
        raise AgreementError(report.problem)
