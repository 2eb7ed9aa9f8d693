"""An answer for the terminal: predictions, and the account of each explained logit as signed bars."""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrine.models.tables import new_console, show
from vitrine.service.schemas.attention import AttentionAccount, PairFeature, ScorePair
from vitrine.service.schemas.attribute import AttributeResponse, Explanation, LensLayer
from vitrine.service.schemas.classify import Verdict
from vitrine.service.schemas.residual import ResidualFeatures
from vitrine.service.schemas.sources import SourceAccount

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HALF = 14  # characters on either side of zero
_NAMED = 10  # labels in a verdict


def print_answer(answer: AttributeResponse, console: Console) -> None:
    """Print predictions, warnings, one account per target (two, if sources were asked for), what else was asked for
    (lens, residual SAEs, an attention score), and the fidelity."""
    table = Table(title=None, box=None, pad_edge=False)
    table.add_column("label")
    table.add_column("probability", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("logit", justify="right")
    for prediction in answer.predictions:
        bar = _bar(prediction.probability, 1.0, 20)
        table.add_row(Text(prediction.label), f"{prediction.probability:.1%}", bar, f"{prediction.logit:.2f}")
    show(table, console)
    if answer.verdict is not None:
        console.print(_verdict(answer.verdict))
    if answer.edit is not None:
        was = "applied" if answer.edit.applied else "not applied, its condition is not met"
        console.print(Text(f"edit {answer.edit.name} ({answer.edit.digest[:19]}…, {answer.edit.mode}): {was}"))
    for warning in answer.warnings:
        console.print(Text(f"warning: {warning.message}", style="yellow"))
    for explanation in answer.explanations:
        console.print()
        show(_account(explanation), console)
        if explanation.sources is not None:
            console.print()
            show(_source_account(explanation, explanation.sources), console)
    if answer.lens is not None:
        _print_lens(answer.lens, console)
    if answer.residual is not None:
        _print_residual(answer.residual, console)
    if answer.attention is not None:
        _print_attention(answer.attention, console)
    if (fidelity := answer.fidelity) is None:
        return
    agrees = ("stays", "") if fidelity.reconstructed_top1_agrees else ("changes", "bold")
    share = f"error row {fidelity.error_share:.1%} of the account"
    console.print(Text.assemble(f"\nFidelity: R² {fidelity.r2:.3f}, {share}; without it the top-1 label ", agrees, "."))


def _verdict(verdict: Verdict) -> Text:
    """Which labels reach their threshold; or that none does, and what the softmax would have said."""
    if verdict.none_of_these:
        forced = verdict.softmax
        return Text(
            f"None of these: no label reaches its threshold (the softmax would rank {forced.label} first, "
            f"{forced.probability:.1%})"
        )
    more = f" and {len(verdict.above) - _NAMED:,} more" if len(verdict.above) > _NAMED else ""
    return Text(f"These reach their threshold: {', '.join(verdict.above[:_NAMED])}{more}")


def draw_answer(answer: AttributeResponse) -> str:
    """The same as an SVG picture in the viewer's own fonts, since rich's would be fetched from the network."""
    console = new_console(record=True, width=104, file=io.StringIO())
    print_answer(answer, console)
    return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="vitrine attribute"), flags=re.DOTALL)


def _account(explanation: Explanation) -> Table:
    ledger = explanation.ledger
    written = "CLT" if ledger.clt else "MLP"
    rows = [("prior", ledger.prior, "")]
    rows += [(f"attention {layer}", value, "") for layer, value in enumerate(ledger.attention)]
    for layer in explanation.layers:
        named = "  ".join(f"{_named_feature(f.index, f.label)} {f.contribution:+.2f}" for f in layer.features)
        rows.append((f"{written} {layer.layer}", layer.contribution, named))
    rows.append(("bias", ledger.bias, ""))
    if ledger.clt:
        rows.append(("error", ledger.error, ""))
    if ledger.edit:
        rows.append(("edit", ledger.edit, "removed by an intervention"))
    title = f"Why {_named(explanation)}: the account of its logit"
    return _table(title, "features (contribution)", rows, ledger.remainder, explanation.logit)


def _source_account(explanation: Explanation, account: SourceAccount) -> Table:
    """As `_source_rows`, of a logit."""
    about = ""
    if any(layer.baseline is not None for layer in account.layers):
        about = ", relative to the average image"
    title = f"Why {_named(explanation)}: followed back through attention{about}"
    return _table(title, "label", _source_rows(account), account.remainder, account.logit)


def _print_residual(residual: ResidualFeatures, console: Console) -> None:
    """The features of each layer's SAE, each with its activation, at patches with the patch where that is."""
    table = Table(title=Text("What the residual SAEs read after each block"), box=None, title_justify="left")
    for heading in ("layer", "at [CLS]", "at patches (row, column)"):
        table.add_column(heading, overflow="fold")
    for layer in residual.layers:
        of_cls = [f"{_named_feature(feature.index, feature.label)} {feature.activation:.2f}" for feature in layer.cls]
        of_patches = []
        for feature in layer.patches:
            row, column = divmod(
                max(range(len(feature.tokens)), key=lambda at: abs(feature.tokens[at])), residual.columns
            )
            of_patches.append(
                f"{_named_feature(feature.index, feature.label)} {feature.activation:.2f} ({row + 1}, {column + 1})"
            )
        table.add_row(str(layer.layer), Text("  ".join(of_cls)), Text("  ".join(of_patches)))
    console.print()
    show(table, console)


def _named_feature(index: int, label: str | None) -> str:
    """With its number, by which its card is found."""
    return f"{label} #{index}" if label else f"#{index}"


def _print_lens(lens: list[LensLayer], console: Console) -> None:
    table = Table(title=Text("The prediction after each layer"), box=None, title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("label", overflow="fold")
    table.add_column("probability", justify="right")
    table.add_column("entropy (nats)", justify="right")
    for layer in lens:
        table.add_row(str(layer.layer), Text(layer.label), f"{layer.probability:.1%}", f"{layer.entropy:.3f}")
    console.print()
    show(table, console)


def _print_attention(account: AttentionAccount, console: Console) -> None:
    """Why a head looks there: what made the query, what made the key, and the pairs of both."""
    least = f" minus its mean over all keys, {account.mean_score:.3f}" if account.relative else ""
    console.print(
        f"\nHead {account.head} of layer {account.layer} attends from {_token(account, account.query)} to "
        f"{_token(account, account.key)} with {account.weight:.1%} of its attention.\nThe accounts explain the score "
        f"{account.score:.3f}{least}.",
        highlight=False,
        markup=False,
    )
    for what, side in (("the query", account.of_query), ("the key", account.of_key)):
        console.print()
        rows = _source_rows(side)
        show(_table(f"What made {what}", "label", rows, side.remainder, account.explained, "scores"), console)
    if not account.pairs:
        return
    pairs = [(f"{_pair(pair.query)} · {_pair(pair.key)}", pair.contribution, _labels(pair)) for pair in account.pairs]
    rows = [*pairs, ("all others", account.other_pairs, "other features, embeddings, errors, biases, constants")]
    console.print()
    show(_table("Pairs of features, query · key", "labels", rows, 0.0, account.explained, "scores"), console)


def _token(account: AttentionAccount, token: int) -> str:
    if token == 0:
        return "[CLS]"
    row, column = divmod(token - 1, account.columns)
    return f"token {token} (patch in row {row + 1}, column {column + 1})"


def _pair(feature: PairFeature) -> str:
    return f"{feature.layer}/{feature.index}"


def _labels(pair: ScorePair) -> str:
    labels = [feature.label or "–" for feature in (pair.query, pair.key)]
    return " · ".join(labels) if pair.query.label or pair.key.label else ""


def _source_rows(account: SourceAccount) -> list[tuple[str, float, str]]:
    """Features first, the largest first; then what is no feature, each kind in one row over all layers."""
    features = [(f"layer {f.layer} #{f.index}", f.contribution, f.label or "") for f in account.features]
    other = sum(layer.features for layer in account.layers) - sum(value for _, value, _ in features)
    rows = [
        *features,
        ("other features", other, ""),
        ("error", sum(layer.error for layer in account.layers), f"{account.error_share:.1%} of this account"),
        ("embeddings", sum(account.embedding), "the tokens as they enter the first block"),
        ("biases", sum(layer.bias for layer in account.layers), ""),
        ("constants", account.constants, "added by attention for every image"),
    ]
    if any(layer.baseline is not None for layer in account.layers):
        rows += [
            ("baseline", sum(layer.baseline or 0 for layer in account.layers), "features in the average image"),
            ("silent", sum(layer.silent or 0 for layer in account.layers), "minus those that do not fire here"),
        ]
    return rows


def _named(explanation: Explanation) -> str:
    contrast = f" rather than {explanation.contrast}" if explanation.contrast else ""
    return f"{explanation.target}{contrast}"


def _table(
    title: str, last: str, rows: list[tuple[str, float, str]], remainder: float, total: float, unit: str = "logits"
) -> Table:
    """rows: (name, number, what stands in the column `last`). With `remainder` they add up to `total`."""
    table = Table(title=Text(title), box=None, title_justify="left")
    table.add_column("row")
    table.add_column(unit, justify="right")
    table.add_column("-" + " " * (_HALF - 1) + "│" + " " * (_HALF - 1) + "+", no_wrap=True)
    table.add_column(last, overflow="fold")
    largest = max(abs(value) for _, value, _ in rows)
    for name, value, said in rows:
        table.add_row(
            name, f"{value:+.3f}", _signed_bar(value, largest), Text(said), style="dim" if name == "error" else ""
        )
    table.add_section()
    table.add_row("remainder", f"{remainder:+.1e}", "")
    table.add_row(unit.removesuffix("s"), f"{total:.3f}", "", style="bold")
    return table


def _bar(value: float, largest: float, width: int) -> str:
    """`value` relative to `largest` as blocks, to an eighth of a character."""
    eighths = round(8 * width * value / largest) if largest else 0
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _signed_bar(value: float, largest: float) -> Text:
    """A bar to the right of zero, or one to its left in whole characters (there are no left-hand eighths)."""
    if value >= 0:
        return Text.assemble(" " * _HALF, ("│", "dim"), (_bar(value, largest, _HALF), "blue"))
    length = round(_HALF * -value / largest) if largest else 0
    return Text.assemble(" " * (_HALF - length), ("█" * length, "red"), ("│", "dim"))
