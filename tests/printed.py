"""What is asked of every table that a command prints, at every width."""

import copy
import io
import re
from collections import Counter

from vitrine.models.tables import WHOLE, new_console

WIDTHS = (40, 60, 80, 120)


def check(table, draw, widths=WIDTHS):
    """No number is cut, wrapped apart or left out, and no line is longer than the console is wide."""
    whole = drawn(table, draw, 10_000)
    expected = numbers(whole)
    long = [word for word in whole.split() if len(word) > WHOLE]  # paths and digests, which may be wrapped apart
    for width in widths:
        text = drawn(table, draw, width)
        found = Counter({number: count for number, count in numbers(text).items() if not is_part(number, long)})
        missing = {number for number in expected - found if not is_part(number, long)}
        assert not missing, f"{missing} missing at {width} columns:\n{text}"
        assert found.keys() <= expected.keys(), f"{found.keys() - expected.keys()} at {width} columns:\n{text}"
        assert max(map(len, text.splitlines())) <= width, text


def is_part(number, words):
    return any(number in word for word in words)


def drawn(table, draw, width):
    console = new_console(file=io.StringIO(), width=width)
    draw(copy.deepcopy(table), console)
    return console.file.getvalue()


def numbers(text):
    """How often each number stands there, not counting those in paths and digests."""
    words = [word for word in text.split() if len(word) <= WHOLE]
    return Counter(number for word in words for number in re.findall(r"\d+(?:[.,]\d+)*", word))
