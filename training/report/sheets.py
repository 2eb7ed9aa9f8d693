"""All tables of an evaluation, of either kind of dictionary, and how the terminal shows them."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrine.models.tables import show
from vitrine.training.evaluation.results import Results
from vitrine.training.evaluation.sae_results import SaeResults
from vitrine.training.report.sae_tables import of_saes
from vitrine.training.report.tables import Sheet, of_clt


def sheets(results: Results | SaeResults) -> dict[str, Sheet]:
    """All tables, in display order."""
    return of_saes(results) if isinstance(results, SaeResults) else of_clt(results)


def print_sheets(results: Results | SaeResults, console: Console) -> None:
    """Print all tables to the terminal, then what could not be measured."""
    for sheet in sheets(results).values():
        table = Table(title=Text(sheet.caption, style="bold"), title_justify="left", box=None, pad_edge=False)
        for at, name in enumerate(sheet.columns):
            table.add_column(Text(name), justify="left" if at < sheet.text else "right")
        for row in sheet.rows:
            table.add_row(*(Text(cell) for cell in row))
        show(table, console)
        console.print()
    for reason in results.left_out:
        console.print(f"left out: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
