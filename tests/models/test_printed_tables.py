"""Tables for the terminal: whole numbers at any width, and labels and paths as they are."""

import io
import re

import pytest
import typer
from rich.table import Table

from common import ROOT
from printed import WIDTHS, check, drawn
from vitrine.commands import app
from vitrine.models import tables
from vitrine.models.tables import new_console, show


def table(label="a label of several words, [bulk] :cat: and [/x]"):
    made = Table(box=None, pad_edge=False)
    for heading, justify in (("label", "left"), ("logits in the group", "right"), ("share of it all", "right")):
        made.add_column(heading, justify=justify)
    made.add_column("picture", no_wrap=True)
    made.add_column("named", overflow="fold")
    made.add_row(label, "-71.254 (-65.013 to 77.122)", "1,234,567.25 %", "█" * 20, "cat +0.18  a/long/path/" + "x" * 40)
    made.add_row("b", "0.5", "12 %", "█", "")
    return made


def test_numbers_are_whole_at_any_width():
    check(table(), tables._draw, range(30, 140))


def test_a_picture_is_left_out_before_rows_become_lines():
    assert "█" in drawn(table(), show, 140)
    assert "█" not in drawn(table("b"), show, 80)
    assert "label" in drawn(table("b"), show, 80)
    assert drawn(table("b"), show, 34).startswith("b\n  logits in the group: -71.254")


@pytest.mark.parametrize("width", WIDTHS)
def test_what_looks_like_markup_is_printed(width):
    text = " ".join(drawn(table(), show, width).split())
    for part in ("[bulk]", ":cat:", "[/x]"):
        assert part in text
    console = new_console(file=io.StringIO(), width=width)
    console.print("warning: [red]out[/red] :cat:")
    assert console.file.getvalue() == "warning: [red]out[/red] :cat:\n"


def sources():
    for top in ("models", "service", "training", "vitrine/commands"):
        for path in sorted((ROOT / top).glob("**/*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def test_all_consoles_and_tables_are_printed_so():
    for name, text in sources():
        if name == "models/tables.py":
            continue
        assert not re.findall(r"(?<!new_)\bConsole\((?!quiet=True)", text), name
        if "import Table\n" in text and "from rich.table" in text:
            assert "import new_console, show" in text or "import show" in text, name
        assert not re.findall(r"\[/?(?:bold|red|green|blue|yellow)\]", text), f"{name}: a style, not markup"


def commands(command=None):
    command = command or typer.main.get_command(app)
    yield command
    for child in getattr(command, "commands", {}).values():
        yield from commands(child)


def test_brackets_in_help_are_escaped():
    """Typer reads help as markup: `vitrine[bulk]` would be printed as `vitrine`."""
    for command in commands():
        for text in (command.help, command.epilog, *(getattr(option, "help", "") for option in command.params)):
            assert not re.findall(r"(?<!\\)\[[a-z#/@][^\[\]]*\]", text or ""), text
