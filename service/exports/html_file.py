"""A page as one self-contained HTML file, which needs no network and no other file."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Sequence

from vitrine.models.images.decode import TRUSTED, decode
from vitrine.models.images.formats import format_of
from vitrine.service.page_files import FOLDER

_FILE = """<!DOCTYPE html>
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


def html_file(title: str, body: str, data: str, scripts: Sequence[str], styles: Sequence[str]) -> str:
    """The file's text. body, scripts, styles: names of the page's files; data: JSON that the scripts find in #data."""
    script, style = ("\n".join(map(_read_text, names)) for names in (scripts, styles))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return _FILE.format(
        policy=policy,
        title=html.escape(title),
        style=style,
        body=_read_text(body),
        data=data.replace("<", "\\u003c"),  # else a label with </script> in it would end the element
        script=script,
    )


def image_url(image: bytes) -> str:
    """The image as the model saw it, as a data: URL: a JPEG itself, which every browser shows just so, or a PNG.

    Of other formats browsers play animations, leave some unturned, show what is transparent on the page's own colour,
    or cannot read them. Raises `ImageError` for what cannot be decoded.
    """
    format = format_of(image)
    if format != "JPEG":
        buffer = io.BytesIO()
        decode(image, TRUSTED).image.save(buffer, "PNG")
        format, image = "PNG", buffer.getvalue()
    return f"data:image/{format.lower()};base64,{base64.b64encode(image).decode()}"


def _read_text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The hash by which a policy allows an inline script or style; the page must contain exactly `text`."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
