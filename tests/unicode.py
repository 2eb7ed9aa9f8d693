"""Texts that are read differently by a tokenizer that leaves out one of open_clip's steps."""

import html

from hypothesis import strategies as st

FRAGMENTS = (
    *("<end_of_text>", "<start_of_text>", "<END_OF_TEXT>", "<ſtart_of_text>", "[SEP]", "</s>", "<unk>"),
    *("'s", "'ſ", "'LL", "'re", "'", "it's", "&amp;", "&", "amp;", "&lt;", "&#x41;", "&#0;", "&#xd800;", "&nbsp;"),
    *("<", ">", "!", "?!", "_", "__", " ", "  ", "\n", "\t", "\r\n", "\x85", "\u2028", "\x1b[0m", "\0", "\x1f", "\x7f"),
    *("Ã©", "Ã", "â€™", "â€œ", "é", "e\u0301", "\u0345", "İ", "ß", "ẞ", "ſ", "K", "ǆ", "Ａ", "ｶﾞ", "ﬁ", "ﷺ", "猫"),
    *("🐈", "👨‍👩‍👧", "\ud83d", "\udc08", "\ud800", "\udfff", "१", "²", "Ⅻ", "1", "23", "cat", "Dog", "x" * 50),
    *("\ufeff", "\u200b", "\xad", "\ufffd", "한", "\u1100\u1161", "\u0915\u094d\u0937"),
)
# Surrogates are a category of their own, which Hypothesis leaves out of texts unless it is told.
ANY = st.characters(exclude_categories=()) | st.characters(max_codepoint=0x3000, exclude_categories=())


def _wrongly_decoded(text):
    """The text as a program shows it that takes UTF-8 for Latin-1."""
    return text.encode("utf-8", "surrogatepass").decode("latin-1")


MIXED = st.lists(st.sampled_from(FRAGMENTS) | ANY, max_size=25).map("".join)
TEXTS = MIXED | MIXED.map(_wrongly_decoded) | MIXED.map(html.escape)
