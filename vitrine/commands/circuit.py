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
        str,
        typer.Argument(
            metavar="IMAGE|INPUTS", help=f"One image; or many images, to find what they have in common. {INPUTS}"
        ),
    ],
    column: Annotated[
        str | None, typer.Option(help="With Parquet files: the column of image bytes, or of paths.")
    ] = None,
    labels: LabelsList = None,
    labels_file: LabelsFile = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "--label",
            help="Label to explain; default: the label that the folder of images is named after, else top-1.",
        ),
    ] = None,
    contrast: Annotated[str | None, typer.Option(help="Explain the target against this label.")] = None,
    dictionary: Annotated[
        Choice,
        typer.Option(
            help="Use features of the CLT, or of the residual SAEs, each of which depends only on the layer below."
        ),
    ] = Choice.clt,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Largest number of features to follow back in an image, the most influential first; default: 256 for "
            "the "
            "CLT, 2,048 for residual SAEs.",
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.01,
            help="Time limit for following features back, in seconds; the share that is not reached is reported.",
        ),
    ] = 5,
    node_share: Annotated[float, typer.Option(help="Share of all influence that the circuit's nodes keep.")] = 0.8,
    edge_share: Annotated[
        float, typer.Option(help="Share of the influence of all edges that the circuit's edges keep.")
    ] = 0.98,
    leaves: Annotated[
        bool,
        typer.Option("--leaves", help="Also list each feature that was not followed back, instead of only their sums."),
    ] = False,
    groups: Annotated[int, typer.Option(min=1, help="Number of features listed, each summed over all tokens.")] = 20,
    drawn: Annotated[
        int, typer.Option(min=1, help="Number of features drawn by --html, each summed over all tokens.")
    ] = 60,
    images: Annotated[
        int | None, typer.Option(min=1, help="With many images: size of a random sample; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random sample.")] = 0,
    skip_broken_shards: SkipBroken = False,
    bundle: BundlePath = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON: the service's answer, or for many images their mean."),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a page with the drawn circuit and cards to this file; for one image with its photo and both "
            "dictionaries."
        ),
    ] = None,
    graph: Annotated[
        Path | None,
        typer.Option(help="Write the circuit of one image for circuit-tracer and Neuronpedia to NAME.json."),
    ] = None,
) -> None:
    """Print the circuit of a prediction: its attribution graph, pruned and summed over tokens, or a mean of many."""
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
        raise typer.BadParameter(
            f"can only be used with one image, but {inputs} has {len(source):,} images", param_hint="--graph"
        )
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
