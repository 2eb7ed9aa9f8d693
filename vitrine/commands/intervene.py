"""`vitrine intervene`: one image's prediction with something changed, without a server."""

from __future__ import annotations

import asyncio
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vitrine.commands.common import (
    BundlePath,
    LabelsFile,
    LabelsList,
    chosen_labels,
    new_console,
    open_bundle_or_default,
)


class Mode(StrEnum):
    direct = "direct"
    rerun = "rerun"


class Of(StrEnum):
    features = "features"
    patches = "patches"


def intervene(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JPEG, PNG, WebP, HEIC, …")],
    edit: Annotated[
        list[str] | None,
        typer.Option(
            help="A change (repeatable): 'ablate 7/123', 'ablate 7/123 mean', 'scale 7/123 2', 'set 7/123 1.5', "
            "'project 7/123', 'ablate attention 5', 'ablate head 5/3', 'ablate error', or JSON."
        ),
    ] = None,
    edits: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A file with a JSON list of changes, applied before --edit."),
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="direct: change the final residual at [CLS]; rerun: change the running network.")
    ] = Mode.direct,
    counterfactual: Annotated[
        str | None, typer.Option(help="Instead of changes: find what must be removed so that this label comes first.")
    ] = None,
    of: Annotated[Of, typer.Option(help="With --counterfactual: what may be removed.")] = Of.features,
    members: Annotated[int, typer.Option(min=1, help="With --counterfactual: how many may be removed.")] = 32,
    seconds: Annotated[
        float, typer.Option(min=0.01, help="With --counterfactual: time limit of the search, in seconds.")
    ] = 10,
    labels: LabelsList = None,
    labels_file: LabelsFile = None,
    target: Annotated[list[str] | None, typer.Option(help="Label to explain (repeatable); default: top-1.")] = None,
    contrast: Annotated[str | None, typer.Option(help="Explain each target against this label.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Number of predictions listed.")] = 5,
    features: Annotated[int, typer.Option(min=0, help="Number of features listed whose contribution changes.")] = 10,
    bundle: BundlePath = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the service's JSON instead of tables.")] = False,
) -> None:
    """Print a prediction before and after changes, with differences by row; or find what another label would need."""
    from vitrine.models.interventions.short_form import parse
    from vitrine.service.exports.account import intervention_for
    from vitrine.service.exports.intervention import print_intervention
    from vitrine.service.schemas.base import validated
    from vitrine.service.schemas.intervene import InterveneRequest

    fields: dict[str, Any] = {"mode": mode.value, "top_k": top_k}
    fields["explain"] = {"targets": target or None, "contrast": contrast, "features": features}
    fields["edits"] = [] if edits is None else _listed(edits)
    fields["edits"] += [parse(text).model_dump(exclude_unset=True) for text in edit or []]
    if counterfactual is not None:
        asked = {"label": counterfactual, "of": of.value, "members": members, "seconds": seconds}
        fields["counterfactual"] = asked
    elif not fields["edits"]:
        raise typer.BadParameter("give --edit, --edits or --counterfactual", param_hint="--edit")
    if (named := chosen_labels(labels, labels_file)) is not None:
        fields["labels"] = named
    request, opened = validated(InterveneRequest, fields), open_bundle_or_default(bundle)
    answer = asyncio.run(intervention_for(opened, image, request))
    if as_json:
        typer.echo(answer.model_dump_json(indent=2))
    else:
        print_intervention(answer, features, new_console())


def _listed(file: Path) -> list[Any]:
    try:
        listed = json.loads(file.read_bytes())
    except ValueError as error:
        raise typer.BadParameter(f"{file} is not JSON: {error}", param_hint="--edits") from error
    if not isinstance(listed, list):
        raise typer.BadParameter(f"{file} is not a JSON list", param_hint="--edits")
    return listed
