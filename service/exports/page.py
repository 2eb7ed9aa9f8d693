"""The account of one image as an HTML file of its own: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Mapping

from PIL import ExifTags, Image, UnidentifiedImageError

from vitrine.models.bundle.manifest import Preprocessing
from vitrine.service.engine.images import SIGNATURES, ImageLimits, decode
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.attribute import AttributeResponse
from vitrine.service.schemas.features import CardResponse
from vitrine.service.web import DRAWING, FOLDER, STYLES

_ANY_SIZE = ImageLimits(pixels=2**63, side=2**31)  # the image has been answered, so it was not too large
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
    """One HTML file with the account of `answer`, which needs no network and opens from a disk.

    Args:
        answer: with a heat map, if one is to be drawn over the photo.
        image: the file that was asked about, in any format that the service reads.
        cards: of features, by "layer/index"; those that are listed and have none are no buttons.
        preprocessing: the bundle's, which says what part of the photo the model saw.

    Raises `ServiceError` unsupported_image.
    """
    known = ", ".join(f'"{name}": {card.model_dump_json()}' for name, card in cards.items())
    data = (
        f'{{"answer": {answer.model_dump_json()}, "preprocessing": {preprocessing.model_dump_json()}, '
        f'"image": "{_data_url(_still(image))}", "cards": {{{known}}}}}'
    )
    script = "\n".join(_text(name) for name in (*DRAWING, "saved.js"))
    style = "\n".join(_text(name) for name in STYLES)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return _SAVED.format(
        policy=policy,
        title=html.escape(f"{answer.predictions[0].label}: the account of a prediction"),
        style=style,
        body=_text("saved.html"),
        data=data.replace("<", "\\u003c"),  # or a label with </script> in it would end the element
        script=script,
    )


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _still(image: bytes) -> bytes:
    """What the service read of the file, where a browser would play it, or, some of them, not turn it upright."""
    try:
        with Image.open(io.BytesIO(image), formats=["GIF", "WEBP"]) as found:
            if not getattr(found, "is_animated", False) and found.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                return image
    except UnidentifiedImageError:  # a format that browsers show as the service reads it
        return image
    drawn = io.BytesIO()
    decode(image, _ANY_SIZE).save(drawn, "PNG")
    return drawn.getvalue()


def _data_url(image: bytes) -> str:
    name = next((name for name, start in SIGNATURES.items() if start.match(image)), None)
    if name is None:
        raise ServiceError("unsupported_image", f"the image is in none of the formats {', '.join(SIGNATURES)}")
    return f"data:image/{name.lower()};base64,{base64.b64encode(image).decode()}"


def _hash(text: str) -> str:
    """As a policy names an inline script or style. `text` stands in the page exactly so."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
