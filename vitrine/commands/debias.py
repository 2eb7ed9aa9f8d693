"""`vitrine debias`: finds a spurious cue and proposes an edit that removes it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrine.commands.common import (
    BundlePath,
    LabelsFile,
    LabelsList,
    chosen_labels,
    new_console,
    open_bundle_or_default,
)

if TYPE_CHECKING:
    from vitrine.service.offline.debias.examples import Examples
    from vitrine.service.offline.debias.question import By as Choice


class By(StrEnum):
    """How the groups are found."""

    table = "table"
    cue = "cue"
    errors = "errors"


def debias(
    data: Annotated[
        Path, typer.Option(help="Folder of the images; without --groups it must have one subfolder per label.")
    ],
    out: Annotated[Path, typer.Option(help="File for the proposed edit, NAME.json.")],
    groups: Annotated[
        Path | None, typer.Option(help="CSV table of images with label and group, like Waterbirds' metadata.csv.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="With --groups: names of its columns, where they differ: image=NAME,label=NAME,group=NAME,split=NAME."
        ),
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option(
            help="With --groups: two values of its split column, FIND,HELD_OUT; default: val,test, or random halves."
        ),
    ] = None,
    labels: LabelsList = None,
    labels_file: LabelsFile = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Sentence with {} for the label (repeatable); default: the bundle's.")
    ] = None,
    cue: Annotated[
        list[str] | None, typer.Option(help="The cue in words, such as 'a red background' (repeatable).")
    ] = None,
    other: Annotated[
        list[str] | None,
        typer.Option(help="What other images have instead of the cue, such as 'a green background' (repeatable)."),
    ] = None,
    joint: Annotated[str, typer.Option(help="Prompt that combines label and cue.")] = "{label} with {cue}",
    by: Annotated[
        By | None,
        typer.Option(help="How groups are found; default: by the table's column, else by the cue, else by the errors."),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(help="Name of an edit to try, as in the printed trials (repeatable); default: all."),
    ] = None,
    cap: Annotated[
        float, typer.Option(min=0, max=100, help="Percentage points of average accuracy that an edit may cost.")
    ] = 1.0,
    description: Annotated[str | None, typer.Option(help="Description of the edit; default: what was found.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random halves, resamples and random features.")] = 0,
    report: Annotated[Path | None, typer.Option(help="Write all figures to this file, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the printed tables to this file, as a page.")] = None,
    bundle: BundlePath = None,
) -> None:
    """Find a spurious cue that a CLIP uses as well as the label, propose an edit that removes it, and measure the edit.

    Features are ranked by how many logits they move with the group rather than with the label, and a direction is found
    in which the groups differ. The edit is chosen on one half of the images, and all its figures are measured on the
    other half. Nothing is trained.
    """

    from vitrine.models.bundle.manifest import graphs_digest
    from vitrine.models.files.writing import prepare_file, write_text
    from vitrine.models.interventions.edit import check_edit_name, create
    from vitrine.models.progress import track
    from vitrine.service.engine.engine import Engine
    from vitrine.service.engine.labels import LabelEncoder
    from vitrine.service.offline.debias.errors import DebiasError
    from vitrine.service.offline.debias.pictures import Pictures
    from vitrine.service.offline.debias.printing import print_report
    from vitrine.service.offline.debias.question import Question
    from vitrine.service.offline.debias.run import Debias, check_features
    from vitrine.service.offline.debias.runner import BundleRunner
    from vitrine.service.operations.settings import load_settings

    check_edit_name(out.stem)
    for file in (out, report, html):
        if file is not None:
            prepare_file(file)
    opened, settings = open_bundle_or_default(bundle), load_settings().model_copy(update={"replacement": False})
    check_features(opened)
    examples = _examples(data, groups, columns, splits, chosen_labels(labels, labels_file), seed)
    default: Choice = "table" if len(examples.group_names) > 1 else "cue" if cue else "errors"
    chosen_by = by.value if by else default
    if chosen_by == "cue" and not cue:
        raise typer.BadParameter("--by cue requires the cue in words", param_hint="--cue")
    question = Question(
        templates=tuple(template or opened.manifest.text.templates),
        by=chosen_by,
        cue=tuple(cue or ()),
        others=tuple(other or ()),
        joint=joint,
        ops=_ops(op),
        cap=cap / 100,
        seed=seed,
    )
    engine, progress = Engine(opened, settings), new_console(stderr=True)

    def shown(items: Sequence[Any], title: str) -> Iterable[Any]:
        return track(items, title, len(items), progress, "")

    with Pictures(data, opened.manifest.preprocessing, settings) as pictures:
        encoder, runner = LabelEncoder(engine, capacity=1), BundleRunner(engine)
        found = Debias(engine, encoder, runner, pictures, question, shown)(examples)
    if report is not None:
        write_text(report, found.model_dump_json(indent=2) + "\n")
    console = new_console()
    print_report(found, console)
    if html is not None:
        page = new_console(record=True, file=io.StringIO(), width=180)
        print_report(found, page)
        write_text(html, page.export_html())
    if found.mode is None:
        raise DebiasError("no edit was better than none on the finding half; see --report for all trials")
    made = create(
        out.stem,
        description or found.description,
        tuple(found.interventions),
        found.mode,
        graphs_digest(opened.manifest),
        condition=found.condition,
        evidence=found.evidence(str(groups or data)),
    )
    write_text(out, made.text())
    console.print(f"{made.name} {made.digest}, in {out}", soft_wrap=True, highlight=False)


def _ops(asked: list[str] | None) -> tuple[str, ...]:
    from vitrine.service.offline.debias.candidates import EDITS

    for name in asked or ():
        if name not in EDITS:
            raise typer.BadParameter(f"{name!r} is not one of {'; '.join(EDITS)}", param_hint="--op")
    return tuple(asked or EDITS)


def _examples(
    data: Path, groups: Path | None, columns: str | None, splits: str | None, labels: list[str] | None, seed: int
) -> Examples:
    """The images, with groups if a table has them."""
    from vitrine.service.offline.debias.examples import of_folders, of_table
    from vitrine.service.offline.debias.table import parse_columns, read_table

    if groups is None:
        if columns is not None or splits is not None:
            raise typer.BadParameter("--columns and --splits require --groups")
        return of_folders(data, labels, seed)
    halves = None
    if splits is not None:
        first, comma, second = (part.strip() for part in splits.partition(","))
        if not (comma and first and second):
            raise typer.BadParameter("give two values, FIND,HELD_OUT", param_hint="--splits")
        halves = first, second
    return of_table(read_table(groups, parse_columns(columns), labels), labels, seed, halves)
