"""A circuit as one self-contained HTML file: drawn by layers, with the cards of its features."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from vitrine.models.bundle.manifest import Preprocessing
from vitrine.service.exports.circuit_summary import question
from vitrine.service.exports.html_file import html_file, image_url
from vitrine.service.page_files import CIRCUIT_STYLES, SAVED_CIRCUIT_SCRIPTS
from vitrine.service.schemas.circuit_groups import GroupedCircuit
from vitrine.service.schemas.features import CardResponse


def most_influential(circuit: GroupedCircuit, count: int) -> GroupedCircuit:
    """The circuit with its `count` most influential groups alone, and the edges between them and into the target."""
    edges = [edge for edge in circuit.edges if edge.source < count and (edge.target is None or edge.target < count)]
    return circuit.model_copy(update={"groups": circuit.groups[:count], "edges": edges})


def draw_circuit(
    circuits: Sequence[GroupedCircuit],
    count: int,
    image: bytes | None,
    cards: Mapping[str, CardResponse],
    preprocessing: Preprocessing,
) -> str:
    """One HTML file with the `count` most influential groups of a circuit; it needs no network and opens from disk.

    Args:
        circuits: of the same question by one dictionary each, the first of which is shown until another is chosen.
        image: the image file, in any format that the service reads; None for a circuit of many images.
        cards: of features, by "dictionary/layer/index"; a feature without a card is drawn all the same.
        preprocessing: the bundle's, which determines the part of the photo that the model saw.

    Raises `ImageError` for an image that cannot be decoded.
    """
    data = {
        "circuits": [
            {
                "circuit": most_influential(circuit, count).model_dump(mode="json"),
                "title": question(circuit),
                "all": len(circuit.groups),
            }
            for circuit in circuits
        ],
        "image": None if image is None else image_url(image),
        "cards": {name: card.model_dump(mode="json") for name, card in cards.items()},
        "preprocessing": preprocessing.model_dump(mode="json"),
    }
    title = f"{question(circuits[0])}: a circuit"
    return html_file(title, "circuit.html", json.dumps(data), SAVED_CIRCUIT_SCRIPTS, CIRCUIT_STYLES)
