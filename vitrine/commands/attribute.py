"""`vitrine attribute`: one image's account, without a server."""

from __future__ import annotations

import asyncio
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vitrine.commands.common import (
    Baseline,
    BundlePath,
    EditName,
    LabelSet,
    LabelsFile,
    LabelsList,
    SourceBaseline,
    TemplateList,
    chosen_labels,
    new_console,
    open_bundle_or_default,
)


class Scoring(StrEnum):
    softmax = "softmax"
    independent = "independent"


def attribute(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JPEG, PNG, WebP, HEIC, …")],
    labels: LabelsList = None,
    labels_file: LabelsFile = None,
    label_set: LabelSet = None,
    template: TemplateList = None,
    target: Annotated[list[str] | None, typer.Option(help="Label to explain (repeatable); default: top-1.")] = None,
    contrast: Annotated[str | None, typer.Option(help="Explain each target rather than this label.")] = None,
    strict: Annotated[bool, typer.Option(help="Refuse labels that are cut, the same or unknown to the CLIP.")] = False,
    top_k: Annotated[int, typer.Option(min=1, help="Predictions listed.")] = 5,
    scoring: Annotated[
        Scoring,
        typer.Option(help="softmax: one of the labels it is; independent: each for itself, so that none may be."),
    ] = Scoring.softmax,
    threshold: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="Of --scoring independent: the cosine that a label must reach."),
    ] = None,
    features: Annotated[int, typer.Option(min=0, help="Features listed per layer.")] = 3,
    sources: Annotated[
        bool,
        typer.Option("--sources", help="Also follow the logit back through attention to the features that made it."),
    ] = False,
    source_features: Annotated[int, typer.Option(min=0, help="Features listed by --sources, of all layers.")] = 12,
    baseline: Baseline = SourceBaseline.zero,
    lens: Annotated[
        bool, typer.Option("--lens", help="Also list the prediction as it stands after each layer.")
    ] = False,
    residual: Annotated[
        bool,
        typer.Option(
            "--residual", help="Also list what the residual SAEs read after each block, where the bundle has them."
        ),
    ] = False,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Also say why a head looks where it does: LAYER/HEAD, LAYER/HEAD/QUERY or LAYER/HEAD/QUERY/KEY. "
            "Tokens count from 0, which is [CLS] and the default query. Default key: where it looks most."
        ),
    ] = None,
    edit: EditName = None,
    bundle: BundlePath = None,
    as_json: Annotated[bool, typer.Option("--json", help="The service's JSON instead of tables.")] = False,
    svg: Annotated[Path | None, typer.Option(help="The tables as a picture too, in this file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="The account with photo, heat map and cards as one page, in this file.")
    ] = None,
    graph: Annotated[
        Path | None,
        typer.Option(help="The account as circuit-tracer and Neuronpedia read it, NAME.json; features beside it."),
    ] = None,
) -> None:
    """Predict one image's label and print the account of it, without a server."""
    from vitrine.models.files.writing import prepare_file, write_text
    from vitrine.service.exports.account import account_for
    from vitrine.service.exports.render import draw_answer, print_answer
    from vitrine.service.schemas.attribute import AttributeRequest
    from vitrine.service.schemas.base import validated

    if (scoring is Scoring.independent) != (threshold is not None):
        raise typer.BadParameter(
            "--scoring independent and --threshold go together: a label fits whose cosine reaches the threshold",
            param_hint="--threshold",
        )
    for file in (svg, html):
        if file is not None:
            prepare_file(file)
    fields: dict[str, Any] = {"strict": strict, "top_k": top_k, "edit": edit, "label_set": label_set}
    fields |= {"templates": template or None, "scoring": scoring.value, "threshold": threshold}
    fields["explain"] = {"contrast": contrast, "features": features, "lens": lens}
    fields["explain"] |= {"sources": sources, "source_features": source_features, "baseline": baseline.value}
    fields["explain"]["residual"] = residual
    if attention is not None:
        fields["explain"]["attention"] = _head(attention)
    if (named := chosen_labels(labels, labels_file)) is not None:
        fields["labels"] = named
    if target:
        fields["explain"]["targets"] = target
    request, opened = validated(AttributeRequest, fields), open_bundle_or_default(bundle)
    answer, page = asyncio.run(account_for(opened, image, request, with_page=html is not None, graph=graph))
    if as_json:
        typer.echo(answer.model_dump_json(indent=2))
    else:
        print_answer(answer, new_console())
    if svg is not None:
        write_text(svg, draw_answer(answer))
    if html is not None:
        write_text(html, page)


def _head(text: str) -> dict[str, int]:
    """LAYER/HEAD[/QUERY[/KEY]] as the fields of `explain.attention`."""
    names, numbers = ("layer", "head", "query", "key"), text.split("/")
    if not 2 <= len(numbers) <= len(names) or not all(re.fullmatch(r"[0-9]{1,9}", number) for number in numbers):
        raise typer.BadParameter(
            f"{text!r} is not LAYER/HEAD, LAYER/HEAD/QUERY or LAYER/HEAD/QUERY/KEY, all numbers from 0",
            param_hint="--attention",
        )
    return dict(zip(names, map(int, numbers), strict=False))
