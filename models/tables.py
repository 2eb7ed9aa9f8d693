"""Tables for the terminal, in which no number is cut or wrapped apart, however narrow it is; and its console."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

_WIDE = 10_000  # characters; no table has more
WHOLE = 32  # characters of a word with digits that is not wrapped apart; longer ones are paths or digests
_TOGETHER = 12  # of a word without


def new_console(**options: Any) -> Console:
    """A console that prints what it is given: square brackets in labels, names and paths are text, not markup."""
    return Console(markup=False, highlight=False, emoji=False, **options)


def show(table: Table, console: Console) -> None:
    """Print a table as wide as it wants to be, or else narrower: headings and texts are wrapped, numbers stay whole.

    Columns that are aligned on the right hold numbers. Those that may not be wrapped are pictures, which are left out
    before anything else. Where even then there is too little room, a row is printed over lines, each with its heading.
    """
    _draw(table, console)


def _draw(table: Table, console: Console) -> None:
    if not _fit(table, console):
        kept = [column for column in table.columns if not column.no_wrap]
        table.columns = [replace(column, _index=at) for at, column in enumerate(kept)]
        if not _fit(table, console):
            _print_rows(table, console)
            return
    console.print(table)


def _natural(table: Table, console: Console) -> int:
    """Characters that the table takes if nothing is wrapped, but for its title."""
    return console.measure(table, options=console.options.update(width=_WIDE)).maximum


def _fit(table: Table, console: Console) -> bool:
    """Set the columns' widths so that the table suits the console, if that can be."""
    if _natural(table, console) <= console.width:
        return True
    bounds = [_bounds(column, console) for column in table.columns]
    widths, most = [least for least, _ in bounds], [largest for _, largest in bounds]
    spare = console.width - (_natural(table, console) - sum(most)) - sum(widths)
    if spare < 0:
        return False
    for _ in range(min(spare, sum(most) - sum(widths))):
        narrowest = min((width, at) for at, width in enumerate(widths) if width < most[at])[1]
        widths[narrowest] += 1
    for column, width in zip(table.columns, widths, strict=True):
        column.width, column.overflow = width, "fold"
    return True


def _bounds(column: Column, console: Console) -> tuple[int, int]:
    """(least, most) characters of a column."""
    heading, *cells = (_text(cell, console) for cell in (column.header, *column.cells))
    most = max(_longest_line(text) for text in (heading, *cells))
    if column.no_wrap:
        return most, most
    whole = max((_longest_line(cell) for cell in cells), default=0) if column.justify == "right" else 0
    words = [word for text in (heading, *cells) for word in text.plain.split()]
    return max([whole, 1, *map(_together, words)]), max(most, 1)


def _together(word: str) -> int:
    is_number = len(word) <= WHOLE and any(character.isdigit() for character in word)
    return len(word) if is_number else min(len(word), _TOGETHER)


def _longest_line(text: Text) -> int:
    return max((line.cell_len for line in text.split(allow_blank=True)), default=0)


def _text(cell: RenderableType, console: Console) -> Text:
    """A cell as the table would show it: those of ours are texts."""
    return cell if isinstance(cell, Text) else console.render_str(str(cell), highlight=False)


def _print_rows(table: Table, console: Console) -> None:
    """Each row over lines: its first cell, then heading and cell of every other that is not empty."""
    if table.title:
        console.print(table.title)
    headings = [_text(column.header, console).plain for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        first, *rest = (_text(cell, console) for cell in row)
        console.print(first, highlight=False)
        for heading, cell in zip(headings[1:], rest, strict=True):
            if cell.plain.strip():
                console.print(Text(f"  {heading.replace(chr(10), ' ') or 'also'}: "), cell, sep="", highlight=False)
