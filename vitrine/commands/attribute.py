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
    contrast: Annotated[str | None, typer.Option(help="Explain each target against this label.")] = None,
    strict: Annotated[
        bool, typer.Option(help="Refuse labels that this CLIP would cut, cannot distinguish or does not know.")
    ] = False,
    top_k: Annotated[int, typer.Option(min=1, help="Number of predictions listed.")] = 5,
    scoring: Annotated[
        Scoring,
        typer.Option(
            help="softmax: exactly one label fits; independent: each label is scored by itself, so none may fit."
        ),
    ] = Scoring.softmax,
    threshold: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="With --scoring independent: the cosine that a label must reach to fit."),
    ] = None,
    features: Annotated[int, typer.Option(min=0, help="Number of features listed per layer.")] = 3,
    sources: Annotated[
        bool,
        typer.Option("--sources", help="Also follow the logit back through attention to the features that made it."),
    ] = False,
    source_features: Annotated[
        int, typer.Option(min=0, help="Number of features listed by --sources, over all layers.")
    ] = 12,
    baseline: Baseline = SourceBaseline.zero,
    lens: Annotated[bool, typer.Option("--lens", help="Also list the prediction after each layer.")] = False,
    residual: Annotated[
        bool,
        typer.Option(
            "--residual",
            help="Also list the active features of the residual SAEs after each block, if the bundle has SAEs.",
        ),
    ] = False,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Also explain why a head attends where it does: LAYER/HEAD, LAYER/HEAD/QUERY or LAYER/HEAD/QUERY/KEY. "
            "Tokens are numbered from 0; token 0 is [CLS], the default query. Default key: the one attended to most."
        ),
    ] = None,
    edit: EditName = None,
    bundle: BundlePath = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the service's JSON instead of tables.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Also write the tables to this file, as a picture.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the account, photo, heat map and cards to this file.")
    ] = None,
    graph: Annotated[
        Path | None,
        typer.Option(
            help="Write the account for circuit-tracer and Neuronpedia to NAME.json, and its features next to it."
        ),
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
            "give --scoring independent and --threshold together: a label fits if its cosine reaches the threshold",
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
