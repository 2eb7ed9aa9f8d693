"""How CLIP predicts when the bundle's features replace its MLPs, on your own images: `vitrine replay`.

The cascaded replacement of arXiv 2604.13304 (`models.account.windows`), from the bundle alone and without torch. The
input is a folder of images, or of one folder per label: these are the labels then, and accuracies are measured, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from rich import box
from rich.console import Console
from rich.table import Table

from vitrine.models.account.ledger import logits, probabilities
from vitrine.models.account.windows import TOKENS, Tokens, paper_windows, replacement_mask
from vitrine.models.errors import VitrineError
from vitrine.models.texts.labels import notices_of
from vitrine.service.answers.explain import matrix
from vitrine.service.answers.notices import to_notices
from vitrine.service.engine.decoders import Decoders
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.images import ImageLimits
from vitrine.service.engine.labels import LabelEncoder
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.attribute import Matrix
from vitrine.service.schemas.base import Notice


class ReplayError(VitrineError, ValueError):
    """The bundle or the folder cannot be used for a replay; the message says why."""


class Row(BaseModel):
    """Predictions with the MLPs of a window replaced, for some tokens. None: the images have no labels of their own."""

    first: int = Field(description="layer of the window, which ends with the last one")
    tokens: Tokens
    top1: float | None = Field(description="share of images whose own label has the largest logit")
    agreement: float = Field(description="share of images with the same top-1 as CLIP's")
    divergence: float = Field(description="Kullback-Leibler divergence from CLIP's probabilities, mean, in nats")


class Replay(BaseModel):
    bundle: str = Field(description="digest")
    images: int
    unreadable: list[str] = Field(description="files that are no usable images, left out, with the reason")
    labels: list[str]
    warnings: list[Notice] = Field(description="of the labels")
    top1: float | None = Field(description="CLIP's own")
    rows: list[Row]
    matrix: Matrix = Field(description="C_{i->j} of CLIP itself, mean over images")


def find_images(folder: Path) -> tuple[list[Path], list[str]]:
    """(files, labels): of FOLDER/LABEL/..., else of FOLDER itself, without labels. Hidden files are ignored.

    Raises `ReplayError` if there are no files.
    """
    if not folder.is_dir():
        raise ReplayError(f"{folder} is no directory")
    labels = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    candidates: Iterable[Path] = [path for label in labels for path in (folder / label).rglob("*")] or folder.iterdir()
    files = sorted(path for path in candidates if path.is_file() and not path.name.startswith("."))
    if not files:
        raise ReplayError(f"{folder} has no images: put them there, or into one folder a label")
    return files, labels


def replay(
    engine: Engine,
    folder: Path,
    limits: ImageLimits,
    decode_seconds: float = 10.0,
    count: int | None = None,
    seed: int = 0,
    track: Callable[[Sequence[list[Path]]], Iterable[list[Path]]] = iter,
) -> Replay:
    """Replay `count` randomly chosen images of a folder, or all.

    Args:
        track: yields the batches, and may show progress.

    Raises:
        ReplayError: the bundle has no replacement graph, or the folder has no usable image.
    """
    manifest = engine.bundle.manifest
    if not engine.can_replace:
        raise ReplayError(f"{engine.bundle.path} has no replacement graph: export it with `bundle.replacement = true`")
    files, own_labels = find_images(folder)
    labels = own_labels or list(manifest.text.labels)
    encoder, templates = LabelEncoder(engine, capacity=len(labels)), manifest.text.templates
    embeddings, notices = encoder.encode(labels, templates), notices_of(encoder.reader, labels, templates)
    if count is not None and count < len(files):
        chosen = np.random.default_rng(seed).choice(len(files), count, replace=False)
        files = [files[index] for index in sorted(chosen)]
    layers = manifest.shape.layers
    pairs = [(window, tokens) for window in paper_windows(layers) for tokens in TOKENS]
    masks = [np.zeros((layers, 2), bool), *(replacement_mask(layers, window, tokens) for window, tokens in pairs)]

    log_probabilities: list[NDArray[np.floating]] = []  # log-probabilities [masks, B, labels]
    truth: list[int] = []
    scores = np.zeros((2, layers, layers))
    unreadable: list[str] = []
    size = max(engine.batches)
    with Decoders(1, manifest.preprocessing, limits, decode_seconds) as decoders:
        for batch in track([files[at : at + size] for at in range(0, len(files), size)]):
            pixels = []
            for file in batch:
                try:
                    pixels.append(decoders.decode(file.read_bytes()))
                except (ServiceError, OSError) as error:
                    unreadable.append(f"{file}: {error}")
                    continue
                truth.append(labels.index(file.relative_to(folder).parts[0]) if own_labels else -1)
            if pixels:
                outputs = [engine.replace(np.stack(pixels), mask) for mask in masks]
                scores += outputs[0][1].sum(0)
                values = logits(np.stack([output[0] for output in outputs]), embeddings, manifest.logit_scale)
                log_probabilities.append(np.log(np.maximum(probabilities(values), 1e-300)))
    if not log_probabilities:
        raise ReplayError(f"{folder} has no usable image; the first: {unreadable[0]}")

    all_logs = np.concatenate(log_probabilities, axis=1)
    clip_logs, predicted = all_logs[0], all_logs.argmax(-1)
    accuracies = (predicted == np.array(truth)).mean(-1) if own_labels else None
    divergences = (np.exp(clip_logs) * (clip_logs - all_logs)).sum(-1).mean(-1)
    rows = [
        Row(
            first=window[0],
            tokens=tokens,
            top1=None if accuracies is None else accuracies[at],
            agreement=(predicted[at] == predicted[0]).mean(),
            divergence=divergences[at],
        )
        for at, (window, tokens) in enumerate(pairs, start=1)
    ]
    return Replay(
        bundle=engine.bundle.digest,
        images=len(truth),
        unreadable=unreadable,
        labels=labels,
        warnings=to_notices(notices),
        top1=None if accuracies is None else accuracies[0],
        rows=rows,
        matrix=matrix(scores / len(truth)),
    )


def print_replay(result: Replay, console: Console) -> None:
    """Print what there is to say of the labels, a row per window and token type, then the files left out."""
    for warning in result.warnings:
        console.print(f"warning: {warning.message}", style="yellow", highlight=False, markup=False)
    last = len(result.matrix.cls) - 1
    accuracy = "" if result.top1 is None else f"; CLIP's own top-1 {result.top1:.2%}"
    console.print(f"{result.images:,} images, {len(result.labels):,} labels{accuracy}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("MLPs replaced")
    for heading in ("tokens", "top-1", "points", "same top-1 as CLIP", "divergence, nats"):
        table.add_column(heading, justify="left" if heading == "tokens" else "right")
    for row in result.rows:
        accuracies = ["", ""]
        if row.top1 is not None and result.top1 is not None:
            accuracies = [f"{row.top1:.2%}", f"{100 * (row.top1 - result.top1):+.2f}"]
        table.add_row(
            f"{row.first} to {last}", row.tokens, *accuracies, f"{row.agreement:.2%}", f"{row.divergence:.4f}"
        )
    console.print(table)
    if result.unreadable:
        more = f" and {len(result.unreadable) - 3} more" if len(result.unreadable) > 3 else ""
        console.print(f"left out: {'; '.join(result.unreadable[:3])}{more}", style="yellow", markup=False)
