"""The account of one image as one self-contained HTML file, which needs no network and no other file."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Mapping

from vitrine.models.bundle.manifest import Preprocessing
from vitrine.models.images.decode import TRUSTED, decode
from vitrine.models.images.formats import format_of
from vitrine.service.page_files import DRAWING_SCRIPTS, FOLDER, STYLES
from vitrine.service.schemas.attribute import AttributeResponse
from vitrine.service.schemas.features import CardResponse

_SAVED = """<!DOCTYPE html>
<html lang="en-GB">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def draw_page(
    answer: AttributeResponse, image: bytes, cards: Mapping[str, CardResponse], preprocessing: Preprocessing
) -> str:
    """One HTML file with the account of `answer`; it needs no network and opens from disk.

    Args:
        answer: with a heat map, if one should be drawn over the photo.
        image: the image file, in any format that the service reads.
        cards: of features, by "layer/index"; listed features without a card get no button.
        preprocessing: the bundle's, which determines the part of the photo that the model saw.

    Raises `ImageError` for what cannot be decoded.
    """
    cards_json = ", ".join(f'"{name}": {card.model_dump_json()}' for name, card in cards.items())
    data = (
        f'{{"answer": {answer.model_dump_json()}, "preprocessing": {preprocessing.model_dump_json()}, '
        f'"image": "{_data_url(image)}", "cards": {{{cards_json}}}}}'
    )
    script = "\n".join(_read_text(name) for name in (*DRAWING_SCRIPTS, "saved.js"))
    style = "\n".join(_read_text(name) for name in STYLES)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return _SAVED.format(
        policy=policy,
        title=html.escape(f"{answer.predictions[0].label}: the account of a prediction"),
        style=style,
        body=_read_text("saved.html"),
        data=data.replace("<", "\\u003c"),  # else a label with </script> in it would end the element
        script=script,
    )


def _read_text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _data_url(image: bytes) -> str:
    """The image as the model saw it: a JPEG itself, which every browser shows just so, or a PNG.

    Of other formats browsers play animations, leave some unturned, show what is transparent on the page's own colour,
    or cannot read them.
    """
    format = format_of(image)
    if format != "JPEG":
        buffer = io.BytesIO()
        decode(image, TRUSTED).image.save(buffer, "PNG")
        format, image = "PNG", buffer.getvalue()
    return f"data:image/{format.lower()};base64,{base64.b64encode(image).decode()}"


def _hash(text: str) -> str:
    """The hash by which a policy allows an inline script or style; the page must contain exactly `text`."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
