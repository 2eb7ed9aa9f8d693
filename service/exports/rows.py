"""Accounts as flat lists of rows, which add up to the logit, for whatever prints, tabulates or draws them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vitrine.service.schemas.attribute import LedgerAccount
from vitrine.service.schemas.sources import SourceAccount


class Row(NamedTuple):
    """One part of an account, in logits."""

    kind: str  # as in the answer: prior, attention, clt, mlp, …
    layer: int | None
    value: float
    token: int | None = None

    @property
    def name(self) -> str:
        """For people: "attention 3", "CLT 11"."""
        kind = {"clt": "CLT", "mlp": "MLP"}.get(self.kind, self.kind)
        place = self.layer if self.layer is not None else self.token
        return kind if place is None else f"{kind} {place}"


def ledger_rows(ledger: LedgerAccount) -> Iterator[Row]:
    """All rows of a ledger, the remainder last. `mlp` rows are among them only where they are part of the sum."""
    yield Row("prior", None, ledger.prior)
    for layer, value in enumerate(ledger.attention):
        yield Row("attention", layer, value)
    kind, written = ("clt", ledger.clt) if ledger.clt else ("mlp", ledger.mlp or [])
    for layer, value in enumerate(written):
        yield Row(kind, layer, value)
    yield Row("bias", None, ledger.bias)
    if ledger.clt:
        yield Row("error", None, ledger.error)
    yield Row("edit", None, ledger.edit)
    yield Row("remainder", None, ledger.remainder)


def source_rows(account: SourceAccount) -> Iterator[Row]:
    """All rows of a source account, the remainder last."""
    for layer in account.layers:
        yield Row("features", layer.layer, layer.features)
        yield Row("error", layer.layer, layer.error)
        yield Row("bias", layer.layer, layer.bias)
        if layer.baseline is not None and layer.silent is not None:
            yield Row("baseline", layer.layer, layer.baseline)
            yield Row("silent", layer.layer, layer.silent)
    for token, value in enumerate(account.embedding):
        yield Row("embedding", None, value, token)
    yield Row("constants", None, account.constants)
    yield Row("remainder", None, account.remainder)
