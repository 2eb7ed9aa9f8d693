"""`vitrine circuit`: which features made the features that made a prediction, without a server."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrine.commands.common import (
    INPUTS,
    BundlePath,
    LabelsFile,
    LabelsList,
    SkipBroken,
    chosen_labels,
    new_console,
    open_bundle_or_default,
)

if TYPE_CHECKING:
    from vitrine.models.bundle.bundle import Bundle
    from vitrine.models.inputs.source import Source
    from vitrine.service.schemas.circuit import CircuitRequest
    from vitrine.service.schemas.circuit_groups import GroupedCircuit


class Choice(StrEnum):
    """Whose features a circuit has."""

    clt = "clt"
    residual = "residual"


def circuit(
    inputs: Annotated[
        str, typer.Argument(metavar="IMAGE|INPUTS", help=f"One image; or many, for what they have in common. {INPUTS}")
    ],
    column: Annotated[str | None, typer.Option(help="Of Parquet inputs: image bytes, or paths.")] = None,
    labels: LabelsList = None,
    labels_file: LabelsFile = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "--label",
            help="Label to explain; default: top-1, of a folder that is named after a label this label.",
        ),
    ] = None,
    contrast: Annotated[str | None, typer.Option(help="Explain the target rather than this label.")] = None,
    dictionary: Annotated[
        Choice,
        typer.Option(help="Features of the CLT, or of the residual SAEs, each made by the layer below alone."),
    ] = Choice.clt,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Features followed back at most in an image, the most influential first; default: 256 of the CLT's, "
            "2,048 of residual SAEs'.",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="For that; what is not reached is told as a share.")] = 5,
    node_share: Annotated[float, typer.Option(help="Of all influence that the circuit's nodes have.")] = 0.8,
    edge_share: Annotated[float, typer.Option(help="Of the influence of the edges between them, likewise.")] = 0.98,
    leaves: Annotated[
        bool, typer.Option("--leaves", help="Features that were not followed as nodes, too, not only their sums.")
    ] = False,
    groups: Annotated[int, typer.Option(min=1, help="Features listed, each over all tokens.")] = 20,
    drawn: Annotated[int, typer.Option(min=1, help="Features drawn by --html, likewise.")] = 60,
    images: Annotated[int | None, typer.Option(min=1, help="Of many, a random sample; default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    skip_broken_shards: SkipBroken = False,
    bundle: BundlePath = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON: the service's answer; of many images, their mean."),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="The circuit drawn, with photo and cards, in this file; of one image by both dictionaries."),
    ] = None,
    graph: Annotated[
        Path | None,
        typer.Option(help="One image's, as circuit-tracer and Neuronpedia read it, in NAME.json."),
    ] = None,
) -> None:
    """Print the circuit of a prediction, its attribution graph, pruned and summed over tokens; of many, their mean."""
    from vitrine.models.files.writing import prepare_file, write_text
    from vitrine.models.inputs.opening import open_inputs
    from vitrine.models.inputs.source import Files
    from vitrine.service.exports.account import circuit_page
    from vitrine.service.exports.circuit_summary import print_circuit
    from vitrine.service.schemas.base import validated
    from vitrine.service.schemas.circuit import CircuitRequest

    fields: dict[str, Any] = {"target": target, "contrast": contrast, "nodes": nodes, "seconds": seconds}
    fields |= {"dictionary": dictionary.value, "node_share": node_share, "edge_share": edge_share, "leaves": leaves}
    if (named := chosen_labels(labels, labels_file)) is not None:
        fields["labels"] = named
    if graph is not None:
        fields["top_k"] = 2**31  # so that the target is among the predictions
    request, source = validated(CircuitRequest, fields), open_inputs(inputs, column, skip_broken_shards)
    is_one = isinstance(source, Files) and source.kind == "files" and len(source) == 1
    if graph is not None and not is_one:
        raise typer.BadParameter(f"of one image, and {inputs} stands for {len(source):,}", param_hint="--graph")
    for file in (html, graph):
        if file is not None:
            prepare_file(file)
    opened, image = open_bundle_or_default(bundle), None
    if is_one:
        found, image = _of_one(opened, source, request, graph, as_json, every=html is not None)
    else:
        found = [_of_many(opened, source, request, images, seed)]
        if as_json:
            typer.echo(found[0].model_dump_json(indent=2))
    if not as_json:
        print_circuit(found[0], groups, new_console())
    if html is not None:
        write_text(html, circuit_page(opened, found, drawn, image))


def _of_one(
    bundle: Bundle, source: Source, request: CircuitRequest, graph: Path | None, as_json: bool, every: bool
) -> tuple[list[GroupedCircuit], bytes]:
    """(circuit, and if `every` those by other dictionaries; image)."""
    from vitrine.models.files.writing import write_text
    from vitrine.service.answers.circuit_groups import grouped
    from vitrine.service.exports.account import circuits_for
    from vitrine.service.exports.circuit_graph import circuit_graph

    (item,) = source.reader().items(0, 1)
    image = item.read()
    answer, *others = asyncio.run(circuits_for(bundle, image, request, every=every))
    if as_json:
        typer.echo(answer.model_dump_json(indent=2))
    if graph is not None:
        name = Path(item.name).name
        write_text(graph, circuit_graph(answer, name, graph.stem, "./data/none").model_dump_json() + "\n")
    return [grouped(one) for one in (answer, *others)], image


def _of_many(bundle: Bundle, source: Source, request: CircuitRequest, images: int | None, seed: int) -> GroupedCircuit:

    from vitrine.models.progress import track
    from vitrine.service.offline.class_circuit import class_circuit
    from vitrine.service.operations.settings import load_settings

    settings = load_settings().model_copy(update={"decode_threads": 1})
    console = new_console(stderr=True)  # the circuit may go to a file
    return asyncio.run(
        class_circuit(
            bundle,
            settings,
            source,
            request,
            images,
            seed,
            lambda numbers: track(numbers, "circuits", len(numbers), console, "images"),
        )
    )
