"""The account of one image as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping

from vitrine.models.bundle.manifest import Preprocessing
from vitrine.service.exports.html_file import html_file, image_url
from vitrine.service.page_files import DRAWING_SCRIPTS, STYLES
from vitrine.service.schemas.attribute import AttributeResponse
from vitrine.service.schemas.features import CardResponse


def draw_page(
    answer: AttributeResponse, image: bytes, cards: Mapping[str, CardResponse], preprocessing: Preprocessing
) -> str:
    """One HTML file with the account of `answer`; it needs no network and opens from disk.

    Args:
        answer: with a heat map, if one should be drawn over the photo.
        image: the image file, in any format that the service reads.
        cards: of features, by "dictionary/layer/index"; listed features without a card get no button.
        preprocessing: the bundle's, which determines the part of the photo that the model saw.

    Raises `ImageError` for what cannot be decoded.
    """
    cards_json = ", ".join(f'"{name}": {card.model_dump_json()}' for name, card in cards.items())
    data = (
        f'{{"answer": {answer.model_dump_json()}, "preprocessing": {preprocessing.model_dump_json()}, '
        f'"image": "{image_url(image)}", "cards": {{{cards_json}}}}}'
    )
    title = f"{answer.predictions[0].label}: the account of a prediction"
    return html_file(title, "saved.html", data, (*DRAWING_SCRIPTS, "saved.js"), STYLES)
