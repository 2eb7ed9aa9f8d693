"""An answer for the terminal: predictions, and the account of each explained logit as signed bars."""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrine.service.schemas.attribute import AttributeResponse, Explanation

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HALF = 14  # characters on either side of zero


def print_answer(answer: AttributeResponse, console: Console) -> None:
    """Print predictions, warnings, one account per target, and the fidelity."""
    table = Table(title=None, box=None, pad_edge=False)
    table.add_column("label")
    table.add_column("probability", justify="right")
    table.add_column("")
    table.add_column("logit", justify="right")
    for prediction in answer.predictions:
        bar = _bar(prediction.probability, 1.0, 20)
        table.add_row(Text(prediction.label), f"{prediction.probability:.1%}", bar, f"{prediction.logit:.2f}")
    console.print(table)
    for warning in answer.warnings:
        console.print(Text(f"warning: {warning.message}", style="yellow"))
    for explanation in answer.explanations:
        console.print()
        console.print(_account(explanation))
    fidelity = answer.fidelity
    agrees = "stays" if fidelity.reconstructed_top1_agrees else "[bold]changes[/bold]"
    console.print(
        f"\nFidelity: R² {fidelity.r2:.3f}, error row {fidelity.error_share:.1%} of the account; "
        f"without it the top-1 {agrees}.",
        highlight=False,
    )


def draw_answer(answer: AttributeResponse) -> str:
    """The same as an SVG picture in the viewer's own fonts, since rich's would be fetched from the network."""
    console = Console(record=True, width=104, file=io.StringIO())
    print_answer(answer, console)
    return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="vitrine attribute"), flags=re.DOTALL)


def _account(explanation: Explanation) -> Table:
    contrast = f" rather than {explanation.contrast}" if explanation.contrast else ""
    ledger = explanation.ledger
    table = Table(
        title=Text(f"Why {explanation.target}{contrast}: the account of its logit"), box=None, title_justify="left"
    )
    table.add_column("row")
    table.add_column("logits", justify="right")
    table.add_column("−" + " " * (_HALF - 1) + "0" + " " * (_HALF - 1) + "+", no_wrap=True)
    table.add_column("features (contribution)", overflow="fold")
    rows = [("prior", ledger.prior, "")]
    rows += [(f"attention {layer}", value, "") for layer, value in enumerate(ledger.attention)]
    for layer in explanation.layers:
        named = "  ".join(f"{f.label or f'#{f.index}'} {f.contribution:+.2f}" for f in layer.features)
        rows.append((f"CLT {layer.layer}", layer.contribution, named))
    rows += [("bias", ledger.bias, ""), ("error", ledger.error, "")]
    largest = max(abs(value) for _, value, _ in rows)
    for name, value, features in rows:
        table.add_row(
            name, f"{value:+.3f}", _signed_bar(value, largest), Text(features), style="dim" if name == "error" else ""
        )
    table.add_section()
    table.add_row("remainder", f"{ledger.remainder:+.1e}", "")
    table.add_row("logit", f"{explanation.logit:.3f}", "", style="bold")
    return table


def _bar(value: float, largest: float, width: int) -> str:
    """`value` relative to `largest` as blocks, to an eighth of a character."""
    eighths = round(8 * width * value / largest) if largest else 0
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _signed_bar(value: float, largest: float) -> str:
    """A bar to the right of zero, or one to its left in whole characters (there are no left-hand eighths)."""
    if value >= 0:
        return f"{' ' * _HALF}[dim]│[/dim][blue]{_bar(value, largest, _HALF)}[/blue]"
    length = round(_HALF * -value / largest) if largest else 0
    return f"{' ' * (_HALF - length)}[red]{'█' * length}[/red][dim]│[/dim]"
