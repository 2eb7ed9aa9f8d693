"""open_clip's cleaning of a text before it is split into tokens: the same functions, without open_clip.

ftfy repairs mojibake ("schÃ¶n"), full-width letters, ligatures, curly quotes and much more; HTML entities are resolved
twice. Most labels are plain ASCII, to which all of this does nothing: they skip it.
"""

from __future__ import annotations

import html
import string
from typing import Literal

import ftfy

# open_clip's names. lower: OpenAI's and most CLIPs; whitespace: Hugging Face tokenizers; canonicalize: small letters,
# without punctuation.
Clean = Literal["lower", "whitespace", "canonicalize"]
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str, how: Clean) -> str:
    """The text as open_clip's tokenizers split it. Any string can be given; the result has no lone surrogates."""
    # Printable ASCII is 0x20 to 0x7e: no line ends, no control characters, no terminal escapes.
    if not (text.isascii() and text.isprintable()) or "&" in text:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if how == "canonicalize":
        text = text.strip().replace("_", " ").translate(_WITHOUT_PUNCTUATION).lower()
        return " ".join(text.split())
    text = " ".join(text.split())
    return text.lower() if how == "lower" else text
