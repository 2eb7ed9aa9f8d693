"""`vitrine verify --precision`: how well a precision of the vision graph agrees with float32, on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from rich import box
from rich.console import Console
from rich.table import Table

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import Precision, vision_file
from vitrine.models.bundle.manifest import Agreement
from vitrine.models.errors import VitrineError
from vitrine.models.inputs.source import Source
from vitrine.models.precision.agreement import drawn_cosine, measure
from vitrine.models.precision.instructions import int8_instructions
from vitrine.models.precision.sessions import needs_precise_kernels
from vitrine.models.progress import track
from vitrine.models.tables import show
from vitrine.service.engine.decoders import Decoders
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import LabelEncoder
from vitrine.service.engine.runtime import choose, open_session
from vitrine.service.errors import ServiceError
from vitrine.service.offline.failures import failure
from vitrine.service.operations.settings import Settings

BATCH = 8


class AgreementError(VitrineError, ValueError):
    """A precision disagrees with float32 on this machine, or cannot be compared; the message says why."""


class Report(BaseModel):
    """What was measured. None: no images were given, or the bundle does not say."""

    bundle: str = Field(description="digest")
    precision: Precision
    provider: str
    instructions: str = Field(description="int8 instructions of this processor, or none")
    slower_kernels: bool = Field(description="whether ONNX Runtime's usual byte products are wrong on this machine")
    drawn_cosine: float = Field(description="mean cosine with float32's embeddings, on drawn images")
    here: Agreement | None = Field(description="agreement on the given images")
    at_export: Agreement | None
    unreadable: int

    @property
    def problem(self) -> str | None:
        """Why the precision does not do here; None if it does."""
        if self.here is None or self.here.is_sufficient:
            return None
        return f"{self.precision} does not agree with float32 on this machine: {self.here.beside_the_least}"


def agreement(
    bundle: Bundle, settings: Settings, precision: Precision, console: Console, inputs: Source | None = None
) -> Report:
    """Compare a precision with float32, whose byte products are computed by ONNX Runtime's other kernels.

    inputs: images for the whole gate; None: drawn pictures alone. Raises `AgreementError` if the bundle lacks this
    precision or none of the images can be used, `EngineError` if it is refused already (`service.engine.precision`).
    """
    if precision not in bundle.manifest.precisions:
        raise AgreementError(f"{bundle.path} has no {precision}; it has {', '.join(bundle.manifest.precisions)}")
    settings = settings.model_copy(update={"precision": precision, "replacement": False})
    engine = Engine(bundle, settings, choose(bundle, settings))
    runtime = engine.runtime
    reference = open_session(bundle.path / vision_file("fp32"), replace(runtime, precision="fp32"), precise=True)
    here, unreadable = None, list[str]()
    if inputs is not None:
        text = bundle.manifest.text
        labels = LabelEncoder(engine, capacity=1).encode(text.labels, text.templates)
        batches = _batches(engine, inputs, settings, unreadable, console)
        first = next(batches, None)
        if first is None:
            raise AgreementError(f"none of {len(inputs):,} images can be used; the first: {unreadable[0]}")
        here = measure(reference, engine.vision, chain([first], batches), labels, bundle.directions, bundle.fold)
    return Report(
        bundle=bundle.digest,
        precision=precision,
        provider=runtime.provider,
        instructions=int8_instructions() or "none",
        slower_kernels=needs_precise_kernels(),
        drawn_cosine=here.drawn_cosine if here and here.drawn_cosine else drawn_cosine(reference, engine.vision),
        here=here,
        at_export=None if precision == "fp32" else bundle.manifest.agreement.get(precision),
        unreadable=len(unreadable),
    )


def _batches(
    engine: Engine, inputs: Source, settings: Settings, unreadable: list[str], console: Console
) -> Iterator[NDArray[np.float32]]:
    """Normalised pixels [B, 3, H, W] of the images that can be read; adds to `unreadable` why others cannot."""
    preprocessing, limits = engine.bundle.manifest.preprocessing, settings.image_limits
    with Decoders(1, preprocessing, limits, settings.decode_seconds) as decoders, closing(inputs.reader()) as reader:
        pixels = []
        for item in track(reader.items(0, len(inputs)), "verify", len(inputs), console, "images"):
            try:
                pixels.append(decoders.decode(item.read()).pixels)
            except (ServiceError, OSError) as error:
                unreadable.append(f"{item.name}: {failure(error)[1]}")
            if len(pixels) == BATCH:
                yield np.stack(pixels)
                pixels = []
        if pixels:
            yield np.stack(pixels)


def print_agreement(report: Report, console: Console) -> None:
    """A row for this machine, and one for that which exported."""
    plain: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
    kernels = (
        ", with ONNX Runtime's slower kernels, because the usual ones are wrong on this machine"
        if report.slower_kernels
        else ""
    )
    console.print(f"{report.precision} compared with float32 on {report.provider}{kernels}", **plain)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("where")
    for heading in ("images", "top-1", "ledgers' cosine", "top features", "drawn images' cosine", "int8 instructions"):
        table.add_column(heading, justify="right")
    drawn = report.at_export.drawn_cosine if report.at_export else None
    rows: list[tuple[str, Agreement | None, float | None, str]] = [
        ("here", report.here, report.drawn_cosine, report.instructions)
    ]
    if report.at_export:
        rows.append(("at export", report.at_export, drawn, report.at_export.instructions or "not known"))
    for where, measured, cosine, instructions in rows:
        figures = ["", "", "", ""]
        if measured:
            figures = [f"{measured.images:,}", f"{measured.top1:.1%}", f"{measured.ledger_cosine:.4f}"]
            figures.append(f"{measured.top_features:.1%}")
        table.add_row(where, *figures, "" if cosine is None else f"{cosine:.4f}", instructions)
    show(table, console)
    if report.unreadable:
        console.print(f"{report.unreadable:,} images could not be read", style="yellow", **plain)
