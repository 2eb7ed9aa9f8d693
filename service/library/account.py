"""What `Explainer.explain` returns: an answer that can be read, tabulated, drawn and saved."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vitrine.models.errors import VitrineError
from vitrine.models.files.writing import prepare_file, write_text
from vitrine.models.tables import new_console
from vitrine.service.exports.render import print_answer
from vitrine.service.exports.rows import ledger_rows, source_rows
from vitrine.service.schemas.attribute import (
    AttributeResponse,
    Explanation,
    Fidelity,
    HeatMap,
    LayerAccount,
    LedgerAccount,
)
from vitrine.service.schemas.base import Notice
from vitrine.service.schemas.classify import Prediction
from vitrine.service.schemas.sources import SourceAccount

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

HEIGHT = 720  # pixels of the page in a notebook, which scrolls


class MissingPackageError(VitrineError, ImportError):
    """This needs a package that Vitrine does not install; the message names it."""


class Account:
    """A prediction and its account. Jupyter shows it as a page; `print` shows the tables of the command line."""

    answer: AttributeResponse
    """The complete answer, as the service would send it."""

    def __init__(self, answer: AttributeResponse, draw: Callable[[], str]) -> None:
        """draw: makes the page; called when the page is first shown or saved."""
        self.answer, self._draw = answer, draw

    @property
    def label(self) -> str:
        """The top-1 label."""
        return self.predictions[0].label

    @property
    def probability(self) -> float:
        """The probability of the top-1 label."""
        return self.predictions[0].probability

    @property
    def predictions(self) -> list[Prediction]:
        """The predictions, largest logit first."""
        return self.answer.predictions

    @property
    def explanations(self) -> list[Explanation]:
        """One explanation per target. The properties below belong to the first."""
        return self.answer.explanations

    @property
    def ledger(self) -> LedgerAccount:
        """The ledger: its rows, in logits, add up to `logit`."""
        return self.explanations[0].ledger

    @property
    def logit(self) -> float:
        """The logit that is explained: the target's; with a contrast, minus the contrast's."""
        return self.explanations[0].logit

    @property
    def layers(self) -> list[LayerAccount]:
        """The layers, each with its features."""
        return self.explanations[0].layers

    @property
    def sources(self) -> SourceAccount | None:
        """The source account; None unless requested with `sources=True`."""
        return self.explanations[0].sources

    @property
    def heatmap(self) -> HeatMap | None:
        """The heat map; None unless requested with `heatmap=True`."""
        return self.explanations[0].heatmap

    @property
    def fidelity(self) -> Fidelity | None:
        """How far the features can be trusted. None in a bundle without a CLT."""
        return self.answer.fidelity

    @property
    def warnings(self) -> list[Notice]:
        """Warnings about the labels and the image."""
        return self.answer.warnings

    def to_frame(self, of: Literal["ledger", "features", "sources"] = "ledger") -> pandas.DataFrame:
        """A table of all targets, one line per row of the account; requires pandas.

        of: which table. ledger: target, contrast, row, layer, logits (they add up to each target's logit). sources: the
        same for the source account, and token. features: target, contrast, layer, index, activation, logits, label of
        the listed features. Raises `MissingPackageError`; `VitrineError` for sources that were not requested.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingPackageError("to_frame() requires pandas: pip install pandas") from error
        if of not in ("ledger", "features", "sources"):
            raise VitrineError(f"there is no table {of!r}; the tables are ledger, features and sources")
        lines: list[dict[str, Any]] = []
        for one in self.explanations:
            named = {"target": one.target, "contrast": one.contrast}
            if of == "features":
                lines += [named | _feature(layer, feature) for layer in one.layers for feature in layer.features]
            elif of == "ledger":
                lines += [named | _line(row.kind, row.layer, row.value) for row in ledger_rows(one.ledger)]
            elif one.sources is None:
                raise VitrineError("there is no source account here; request it with explain(…, sources=True)")
            else:
                lines += [
                    named | _line(row.kind, row.layer, row.value) | {"token": row.token}
                    for row in source_rows(one.sources)
                ]
        frame = pandas.DataFrame(lines, columns=_COLUMNS[of])
        return frame.astype({name: "Int64" for name in ("layer", "token") if name in frame})

    def plot(self, target: str | None = None, *, ax: Axes | None = None) -> Axes:
        """The ledger as a waterfall from 0 to the logit, in the order of the network; requires matplotlib.

        target: one of the explained labels; default: the first. ax: the axes to draw on. Rows that are too small to see
        are drawn as one. Raises `MissingPackageError`; `VitrineError` for a target that is not explained.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise MissingPackageError("plot() requires matplotlib: pip install matplotlib") from error
        explanation = self._explained(target)
        steps = [(row.name, row.value) for row in ledger_rows(explanation.ledger)]
        least = max(abs(value) for _, value in steps) / 100
        shown = [(name, value) for name, value in steps if abs(value) >= least]
        if len(shown) < len(steps):
            shown.append(("all others", sum(value for _, value in steps if abs(value) < least)))
        if ax is None:
            _, ax = plt.subplots(figsize=(7, 0.24 * (len(shown) + 1) + 1), layout="constrained")
        starts = [sum(value for _, value in shown[:place]) for place in range(len(shown))]
        values = [value for _, value in shown]
        places = range(len(shown))
        ax.barh(places, values, left=starts, color=["#2a7" if value >= 0 else "#c43" for value in values])
        ax.barh([len(shown)], [explanation.logit], color="#456")
        ax.set_yticks([*places, len(shown)], [*(name for name, _ in shown), "logit"])
        for place, (start, value) in enumerate(zip([*starts, 0.0], [*values, explanation.logit], strict=True)):
            ax.annotate(
                f"{value:+.2f}", (max(start, start + value), place), (3, 0), textcoords="offset points", va="center"
            )
        ax.invert_yaxis()
        ax.use_sticky_edges = False  # else numbers at the ends of the longest bars are cut off
        ax.margins(x=0.12, y=0.01)
        ax.axvline(0, color="0.6", linewidth=0.8)
        ax.set_xlabel("logits")
        ax.set_title(f"Why {_title(explanation)}")
        return ax

    def to_json(self, *, indent: int | None = None) -> str:
        """The answer as the service would send it."""
        return self.answer.model_dump_json(indent=indent)

    def save_html(self, path: str | PathLike[str]) -> Path:
        """Write the account as an HTML file with photo, heat map and cards, as `vitrine attribute --html` does.

        Raises `FileError`.
        """
        file = Path(path)
        prepare_file(file)
        write_text(file, self._page)
        return file

    def __repr__(self) -> str:
        return f"<vitrine.Account {_title(self.explanations[0])}: {self.label} {self.probability:.1%}>"

    def __str__(self) -> str:
        text = io.StringIO()
        print_answer(self.answer, new_console(file=text, width=110, color_system=None))
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def _repr_html_(self) -> str:
        """The page in a frame, which shares nothing with the notebook around it."""
        return (
            f'<iframe sandbox="allow-scripts" style="width: 100%; height: {HEIGHT}px; border: 0" '
            f'title="{html.escape(self.label)}: the account" srcdoc="{html.escape(self._page)}"></iframe>'
        )

    @cached_property
    def _page(self) -> str:
        return self._draw()

    def _explained(self, target: str | None) -> Explanation:
        for explanation in self.explanations:
            if target in (None, explanation.target):
                return explanation
        explained = ", ".join(explanation.target for explanation in self.explanations)
        raise VitrineError(f"{target!r} is not explained here, only {explained}; request it with targets=[{target!r}]")


_COLUMNS = {
    "ledger": ["target", "contrast", "row", "layer", "logits"],
    "sources": ["target", "contrast", "row", "layer", "token", "logits"],
    "features": ["target", "contrast", "layer", "index", "activation", "logits", "label"],
}


def _line(kind: str, layer: int | None, value: float) -> dict[str, Any]:
    return {"row": kind, "layer": layer, "logits": value}


def _feature(layer: LayerAccount, feature: Any) -> dict[str, Any]:
    found = {"index": feature.index, "activation": feature.activation, "label": feature.label}
    return found | {"layer": layer.layer, "logits": feature.contribution}


def _title(explanation: Explanation) -> str:
    return explanation.target + (f" rather than {explanation.contrast}" if explanation.contrast else "")
