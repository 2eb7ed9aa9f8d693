"""`vitrine circuit`: which features made the features that made a prediction, without a server."""

from __future__ import annotations

import asyncio
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


def circuit(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JPEG, PNG, WebP, HEIC, …")],
    labels: LabelsList = None,
    labels_file: LabelsFile = None,
    target: Annotated[str | None, typer.Option(help="Label to explain; default: top-1.")] = None,
    contrast: Annotated[str | None, typer.Option(help="Explain the target rather than this label.")] = None,
    nodes: Annotated[
        int, typer.Option(min=0, help="Features followed back at most, the most influential first.")
    ] = 256,
    seconds: Annotated[float, typer.Option(min=0.01, help="For that; what is not reached is told as a share.")] = 5,
    node_share: Annotated[float, typer.Option(help="Of all influence that the printed nodes have.")] = 0.8,
    edge_share: Annotated[float, typer.Option(help="Of the influence of the edges between them, likewise.")] = 0.98,
    groups: Annotated[int, typer.Option(min=1, help="Features listed, each over all tokens.")] = 20,
    bundle: BundlePath = None,
    as_json: Annotated[bool, typer.Option("--json", help="The service's JSON: nodes, edges and scores.")] = False,
    graph: Annotated[
        Path | None, typer.Option(help="The circuit as circuit-tracer and Neuronpedia read it, in NAME.json.")
    ] = None,
) -> None:
    """Print the circuit of one prediction: its attribution graph, pruned, summed over tokens."""
    from vitrine.models.files.writing import prepare_file, write_text
    from vitrine.service.exports.account import circuit_for
    from vitrine.service.exports.circuit_graph import circuit_graph
    from vitrine.service.exports.circuit_summary import print_circuit
    from vitrine.service.schemas.base import validated
    from vitrine.service.schemas.circuit import CircuitRequest

    fields: dict[str, Any] = {"target": target, "contrast": contrast, "nodes": nodes, "seconds": seconds}
    fields |= {"node_share": node_share, "edge_share": edge_share}
    if (named := chosen_labels(labels, labels_file)) is not None:
        fields["labels"] = named
    if graph is not None:
        prepare_file(graph)
        fields["top_k"] = 2**31  # so that the target is among the predictions
    request, opened = validated(CircuitRequest, fields), open_bundle_or_default(bundle)
    answer = asyncio.run(circuit_for(opened, image, request))
    if as_json:
        typer.echo(answer.model_dump_json(indent=2))
    else:
        print_circuit(answer, groups, new_console())
    if graph is not None:
        write_text(graph, circuit_graph(answer, image.name, graph.stem, "./data/none").model_dump_json() + "\n")
