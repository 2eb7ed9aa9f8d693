"""Texts are cleaned as open_clip cleans them, and the short way for plain ASCII is the same as the long one."""

import html
from itertools import product

import ftfy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import get_clean_fn

from unicode import TEXTS
from vitrine.models.texts.clean import clean

PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("&", "")


@pytest.mark.parametrize("how", ["lower", "whitespace", "canonicalize"])
@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
@example(text="< &amp;amp;lt; &amp;amp;amp;")  # "<" keeps ftfy from resolving entities
def test_cleaning_is_open_clips(how, text):
    assert clean(text, how) == get_clean_fn(how)(text)


def test_what_is_skipped_for_ascii_would_change_nothing():
    """Every pair, so that every character has every other beside it; and texts of them."""
    pairs = "".join(map("".join, product(PRINTABLE, repeat=2)))
    for text in (pairs, pairs.replace("<", ""), *PRINTABLE):  # "<" turns entities off
        assert html.unescape(html.unescape(ftfy.fix_text(text))) == text


@settings(deadline=None, max_examples=200)
@given(text=st.text(PRINTABLE, max_size=80))
def test_nor_in_any_order(text):
    assert html.unescape(html.unescape(ftfy.fix_text(text))) == text
