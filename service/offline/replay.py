"""How CLIP predicts when the bundle's features stand in for its MLPs, on images of one's own: `vitrine replay`.

The cascaded replacement of arXiv 2604.13304 (`models.account.windows`), from the bundle alone and without torch. A
folder of images, or of one folder a label: then the labels are theirs, and accuracies are measured too.
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
from vitrine.models.account.windows import TOKENS, Tokens, paper_windows, replaced
from vitrine.models.errors import VitrineError
from vitrine.service.answers.explain import matrix
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.images import ImageLimits, decode, to_pixels
from vitrine.service.engine.labels import LabelEncoder
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.attribute import Matrix


class ReplayError(VitrineError, ValueError):
    """The bundle or the folder is not one that can be replayed; the message says why."""


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
    top1: float | None = Field(description="CLIP's own")
    rows: list[Row]
    matrix: Matrix = Field(description="C_{i->j} of CLIP itself, mean over images")


def find_images(folder: Path) -> tuple[list[Path], list[str]]:
    """(files, labels): of FOLDER/LABEL/..., else of FOLDER itself, without labels. Hidden files are none.

    Raises `ReplayError` where there are no files.
    """
    if not folder.is_dir():
        raise ReplayError(f"{folder} is no directory")
    labels = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    inside: Iterable[Path] = [path for label in labels for path in (folder / label).rglob("*")] or folder.iterdir()
    files = sorted(path for path in inside if path.is_file() and not path.name.startswith("."))
    if not files:
        raise ReplayError(f"{folder} has no images: put them there, or into one folder a label")
    return files, labels


def replay(
    engine: Engine,
    folder: Path,
    limits: ImageLimits,
    count: int | None = None,
    seed: int = 0,
    track: Callable[[Sequence[list[Path]]], Iterable[list[Path]]] = iter,
) -> Replay:
    """Replay `count` images of a folder, chosen at random, or all.

    Args:
        track: hands on the batches, and may show how far it is.

    Raises:
        ReplayError: the bundle has no replacement graph, or the folder no usable image.
    """
    manifest = engine.bundle.manifest
    if not engine.can_replace:
        raise ReplayError(f"{engine.bundle.path} has no replacement graph: export it with `bundle.replacement = true`")
    files, own_labels = find_images(folder)
    labels = own_labels or list(manifest.text.labels)
    embeddings = LabelEncoder(engine, capacity=len(labels)).encode(labels, manifest.text.templates)
    if count is not None and count < len(files):
        chosen = np.random.default_rng(seed).choice(len(files), count, replace=False)
        files = [files[index] for index in sorted(chosen)]
    layers = manifest.shape.layers
    pairs = [(window, tokens) for window in paper_windows(layers) for tokens in TOKENS]
    masks = [np.zeros((layers, 2), bool), *(replaced(layers, window, tokens) for window, tokens in pairs)]

    found: list[NDArray[np.floating]] = []  # log-probabilities [masks, B, labels]
    truth: list[int] = []
    scores = np.zeros((2, layers, layers))
    unreadable: list[str] = []
    size = max(engine.batches)
    for some in track([files[at : at + size] for at in range(0, len(files), size)]):
        pixels = []
        for file in some:
            try:
                pixels.append(to_pixels(decode(file.read_bytes(), limits), manifest.preprocessing, limits))
            except (ServiceError, OSError) as error:
                unreadable.append(f"{file}: {error}")
                continue
            truth.append(labels.index(file.relative_to(folder).parts[0]) if own_labels else -1)
        if pixels:
            outputs = [engine.replace(np.stack(pixels), mask) for mask in masks]
            scores += outputs[0][1].sum(0)
            values = logits(np.stack([output[0] for output in outputs]), embeddings, manifest.logit_scale)
            found.append(np.log(np.maximum(probabilities(values), 1e-300)))
    if not found:
        raise ReplayError(f"{folder} has no usable image; the first: {unreadable[0]}")

    logs = np.concatenate(found, axis=1)
    own, best = logs[0], logs.argmax(-1)
    right = (best == np.array(truth)).mean(-1) if own_labels else None
    divergences = (np.exp(own) * (own - logs)).sum(-1).mean(-1)
    rows = [
        Row(
            first=window[0],
            tokens=tokens,
            top1=None if right is None else right[at],
            agreement=(best[at] == best[0]).mean(),
            divergence=divergences[at],
        )
        for at, (window, tokens) in enumerate(pairs, start=1)
    ]
    return Replay(
        bundle=engine.bundle.digest,
        images=len(truth),
        unreadable=unreadable,
        labels=labels,
        top1=None if right is None else right[0],
        rows=rows,
        matrix=matrix(scores / len(truth)),
    )


def print_replay(found: Replay, console: Console) -> None:
    """A row a window and token type; then what was left out."""
    last = len(found.matrix.cls) - 1
    accuracy = "" if found.top1 is None else f"; CLIP's own top-1 {found.top1:.2%}"
    console.print(f"{found.images:,} images, {len(found.labels):,} labels{accuracy}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("MLPs replaced")
    for heading in ("tokens", "top-1", "points", "same top-1 as CLIP", "divergence, nats"):
        table.add_column(heading, justify="left" if heading == "tokens" else "right")
    for row in found.rows:
        accuracies = ["", ""]
        if row.top1 is not None and found.top1 is not None:
            accuracies = [f"{row.top1:.2%}", f"{100 * (row.top1 - found.top1):+.2f}"]
        table.add_row(
            f"{row.first} to {last}", row.tokens, *accuracies, f"{row.agreement:.2%}", f"{row.divergence:.4f}"
        )
    console.print(table)
    if found.unreadable:
        more = f" and {len(found.unreadable) - 3} more" if len(found.unreadable) > 3 else ""
        console.print(f"left out: {'; '.join(found.unreadable[:3])}{more}", style="yellow", markup=False)
