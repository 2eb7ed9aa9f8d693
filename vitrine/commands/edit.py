"""`vitrine edit`: interventions that are kept, to be served by name."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrine.commands import completing
from vitrine.commands.common import (
    INPUTS,
    PLAIN,
    BundlePath,
    LabelsFile,
    chosen_labels,
    new_console,
    open_bundle_or_default,
)

if TYPE_CHECKING:
    from rich.console import Console

    from vitrine.models.bundle.bundle import Bundle
    from vitrine.models.interventions.edit import Condition, Edit

KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", envvar="VITRINE_EDIT_KEY_FILE", help="File with the secret key that signs edits."),
]
Edits = Annotated[
    Path | None,
    typer.Option("--edits", envvar="VITRINE_EDITS", help="Folder of edits, in addition to the bundle's own."),
]
CONDITIONS = "activation_at_least=X, moves_logit=X or changes_prediction"


class Mode(StrEnum):
    direct = "direct"
    rerun = "rerun"


def create(
    name: Annotated[str, typer.Argument(help="The name that requests use.")],
    description: Annotated[str, typer.Option(help="What the edit removes, and why.")],
    edit: Annotated[
        list[str] | None,
        typer.Option(help="An intervention as JSON (repeatable); see the example."),
    ] = None,
    interventions: Annotated[Path | None, typer.Option(help="A file with a JSON list of interventions.")] = None,
    mode: Annotated[
        Mode, typer.Option(help="direct: change the final residual at [CLS]; rerun: change the running network.")
    ] = Mode.direct,
    when: Annotated[
        str | None, typer.Option(help=f"Apply it only to images that meet a condition: {CONDITIONS}; default: to all.")
    ] = None,
    evidence: Annotated[
        Path | None, typer.Option(help="A file with a JSON object to keep in the edit as its evidence.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help=f"Measure the edit's effect on these images and keep it in the edit. {INPUTS}")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="With --images: comma-separated labels; default: the folders' names, or the bundle's labels."
        ),
    ] = None,
    labels_file: LabelsFile = None,
    out: Annotated[Path | None, typer.Option(help="File to write, NAME.json, or its folder.")] = None,
    into: Annotated[Path | None, typer.Option(help="Bundle to write: a copy of --bundle with the edit.")] = None,
    key_file: KeyFile = None,
    bundle: BundlePath = None,
) -> None:
    """Make an edit for a bundle, measure it, sign it, and write it to a file or into a new bundle."""
    from vitrine.models.bundle.manifest import graphs_digest
    from vitrine.models.files.writing import prepare_file, write_text
    from vitrine.models.interventions.edit import create as new
    from vitrine.models.interventions.edit import read_key
    from vitrine.models.interventions.edit_files import add_edits, changes_of
    from vitrine.models.interventions.network import BundleNetwork

    if (out is None) == (into is None):
        raise typer.BadParameter("give either --out, to write a file, or --into, to write a bundle")
    chosen = [_json(text, "--edit") for text in edit or []]
    if interventions is not None:
        listed = _json(interventions.read_text(encoding="utf-8"), str(interventions))
        if not isinstance(listed, list):
            raise typer.BadParameter(f"{interventions} is not a JSON list", param_hint="--interventions")
        chosen += listed
    if out is not None:
        out = out / f"{name}.json" if out.is_dir() else out
        if out.name != f"{name}.json":
            raise typer.BadParameter(f"name the file {name}.json", param_hint="--out")
        prepare_file(out)
    opened, console = open_bundle_or_default(bundle), new_console()
    of_residual = any(isinstance(item, dict) and item.get("dictionary") == "residual" for item in chosen)
    graphs = graphs_digest(opened.manifest, of_residual)
    options: dict[str, Any] = {"condition": _condition(when), "key": read_key(key_file) if key_file else None}
    kept = {} if evidence is None else _json(evidence.read_text(encoding="utf-8"), str(evidence))
    made = new(name, description, tuple(chosen), mode.value, graphs, evidence=kept, **options)
    changes_of(made, opened, BundleNetwork(opened))
    if images is not None:
        effect = _measured(opened, made, images, chosen_labels(labels, labels_file), console)
        kept = {**kept, "measured": {"data": images, **effect}}
        made = new(name, description, tuple(chosen), mode.value, graphs, evidence=kept, **options)
    if out is not None:
        write_text(out, made.text())
    elif into is not None:
        written = add_edits(opened, {name: made}, into)
        console.print(f"{written.manifest.name} {written.digest[:19]}…  {into}", **PLAIN)
    console.print(f"{made.name} {made.digest}{', signed' if made.signature else ''}", **PLAIN)


def show(
    name: Annotated[str, typer.Argument(help="An edit's name, or its file.", autocompletion=completing.edits)],
    edits: Edits = None,
    bundle: BundlePath = None,
) -> None:
    """Print the text of an edit's file, with its evidence."""
    (found,) = _found([name], open_bundle_or_default(bundle), edits)
    typer.echo(found.text(), nl=False)


def list_edits(edits: Edits = None, bundle: BundlePath = None) -> None:
    """List the edits that requests can use: those in the bundle and those in the --edits folder."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from vitrine.models.tables import show

    found = _found(None, open_bundle_or_default(bundle), edits)
    table = Table("name", "digest", "mode", "changes", "signed", "description", box=box.SIMPLE_HEAD, pad_edge=False)
    for one in found:
        signed, changes = "yes" if one.signature else "no", str(len(one.interventions))
        table.add_row(Text(one.name), one.digest[:19] + "…", one.mode, changes, signed, Text(one.description))
    console = new_console()
    if found:
        show(table, console)
    else:
        console.print("no edits", highlight=False)


def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Names or files; default: all.")] = None,
    key_file: KeyFile = None,
    edits: Edits = None,
    bundle: BundlePath = None,
) -> None:
    """Check that edits are unchanged, fit the bundle and, with --key-file, are signed by this key."""
    from vitrine.models.interventions.edit import check_signature, read_key
    from vitrine.models.interventions.edit_files import changes_of
    from vitrine.models.interventions.network import BundleNetwork

    key, opened = read_key(key_file) if key_file else None, open_bundle_or_default(bundle)
    found, console = _found(names or None, opened, edits), new_console()
    for one in found:
        if key is not None:
            check_signature(one, key)
        changes_of(one, opened, BundleNetwork(opened))
        console.print(f"{one.name} {one.digest}", **PLAIN)
    signed = "" if key is None else ", signed by the key"
    console.print(
        f"{len(found)} {'edit' if len(found) == 1 else 'edits'} unchanged, for {opened.manifest.name}{signed}",
        style="green",
        **PLAIN,
    )


def _found(names: list[str] | None, bundle: Bundle, folder: Path | None) -> list[Edit]:
    """Edits by name or by file; None: all."""
    from vitrine.models.interventions.edit import EditError, read_edit
    from vitrine.models.interventions.edit_files import bundle_edits, read_edits

    named = bundle_edits(bundle) | (read_edits(folder) if folder else {})
    if names is None:
        return list(named.values())
    found = []
    for name in names:
        if name not in named and not name.endswith(".json"):
            known = ", ".join(named) or "none"
            raise EditError(f"no edit {name!r}; available: {known}; the name of a file must end in .json")
        found.append(named[name] if name in named else read_edit(Path(name)))
    return found


def _measured(bundle: Bundle, edit: Edit, images: str, labels: list[str] | None, console: Console) -> dict[str, Any]:
    """The effect on images, printed and as JSON."""
    from vitrine.models.inputs.opening import open_inputs
    from vitrine.models.progress import track
    from vitrine.service.engine.edits import serve
    from vitrine.service.engine.engine import Engine
    from vitrine.service.offline.edit_effect import measure, print_effect
    from vitrine.service.operations.settings import load_settings

    settings = load_settings()
    engine = Engine(bundle, settings)
    effect = measure(
        engine,
        serve(edit, engine),
        open_inputs(images),
        settings.image_limits,
        settings.decode_seconds,
        labels,
        lambda batches: track(batches, "edit", len(batches), console, "batches"),
    )
    print_effect(effect, console)
    return effect.model_dump(mode="json")


def _condition(text: str | None) -> Condition | None:
    """NAME or NAME=X as a condition."""
    from pydantic import ValidationError

    from vitrine.models.interventions.edit import Condition

    if text is None:
        return None
    name, given, value = text.partition("=")
    try:
        return Condition.model_validate({name: value if given else True})
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise typer.BadParameter(f"{text!r}: {problem}; conditions are {CONDITIONS}", param_hint="--when") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{text[:80]!r} is not JSON: {error}", param_hint=where) from error
