"""How CLIP predicts when the bundle's features replace its MLPs, on your own images: `vitrine replay`.

The cascaded replacement of arXiv 2604.13304 (`models.account.windows`), from the bundle alone and without torch. The
inputs are those of `vitrine bulk`. If they are a folder with one folder of images per label, these are the labels, and
accuracies are measured, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from rich import box
from rich.console import Console
from rich.table import Table

from vitrine.models.account.ledger import logits, probabilities
from vitrine.models.account.windows import TOKENS, Tokens, paper_windows, replacement_mask
from vitrine.models.errors import VitrineError
from vitrine.models.files.names import printable
from vitrine.models.images.decode import ImageLimits
from vitrine.models.inputs.classes import by_class, class_name
from vitrine.models.inputs.imagenet import class_label, unknown_ids
from vitrine.models.inputs.source import Files, Source
from vitrine.models.tables import show
from vitrine.service.answers.explain import matrix
from vitrine.service.answers.notices import to_notices
from vitrine.service.engine.decoders import Decoders
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import LabelEncoder
from vitrine.service.errors import ServiceError
from vitrine.service.offline.failures import failure
from vitrine.service.schemas.attribute import Matrix
from vitrine.service.schemas.base import Notice


class ReplayError(VitrineError, ValueError):
    """The bundle or the images cannot be used for a replay; the message says why."""


class Row(BaseModel):
    """Predictions with the MLPs of a window replaced, for some tokens. None: the images have no labels of their own."""

    first: int = Field(description="first layer of the window, which ends with the last layer")
    tokens: Tokens
    top1: float | None = Field(description="share of images whose own label has the largest logit")
    agreement: float = Field(description="share of images with the same top-1 label as the unmodified CLIP")
    divergence: float = Field(description="mean Kullback-Leibler divergence from CLIP's probabilities, in nats")


class Replay(BaseModel):
    bundle: str = Field(description="digest")
    images: int
    unreadable: list[str] = Field(description="images that cannot be used, with the reason")
    failed: dict[str, int] = Field(description="number of these images, by error code")
    skipped: list[str] = Field(description="what else was left out of the inputs, one line per reason")
    labels: list[str]
    warnings: list[Notice] = Field(description="warnings about the labels")
    top1: float | None = Field(description="top-1 accuracy of the unmodified CLIP")
    rows: list[Row]
    matrix: Matrix = Field(description="C_{i->j} of the unmodified CLIP, mean over images")


def replay(
    engine: Engine,
    inputs: Source,
    limits: ImageLimits,
    decode_seconds: float = 10.0,
    count: int | None = None,
    seed: int = 0,
    track: Callable[[Sequence[list[int]]], Iterable[list[int]]] = iter,
    labels: Sequence[str] | None = None,
) -> Replay:
    """Replay `count` randomly chosen images, or all.

    Args:
        track: yields the batches of images' numbers, and may show progress.
        labels: default: the names of the folders, ImageNet's for WordNet ids; without folders the bundle's labels.

    Raises:
        ReplayError: the bundle has no replacement graph, a folder is no label, or no image can be used.
        InputError: what is read proves to be damaged.
    """
    manifest = engine.bundle.manifest
    if not manifest.has_features:
        raise ReplayError(f"replay replaces CLIP's MLPs by a CLT: {manifest.why_no_features}")
    if engine.replacement is None:
        raise ReplayError(f"{engine.bundle.path} has no replacement graph; export it with `bundle.replacement = true`")
    folders: tuple[str, ...] = ()
    if isinstance(inputs, Files) and inputs.kind == "folder":
        folders, inputs = by_class(inputs)
    labels = list(labels or dict.fromkeys(map(class_label, folders)) or manifest.text.labels)
    label_of_folder = labels_of(folders, labels)
    label_set = LabelEncoder(engine, capacity=len(labels)).label_set(labels, manifest.text.templates)
    chosen = list(range(len(inputs)))
    if count is not None and count < len(inputs):
        chosen = sorted(np.random.default_rng(seed).choice(len(inputs), count, replace=False).tolist())
    layers = manifest.shape.layers
    pairs = [(window, tokens) for window in paper_windows(layers) for tokens in TOKENS]
    masks = [np.zeros((layers, 2), bool), *(replacement_mask(layers, window, tokens) for window, tokens in pairs)]

    log_probabilities: list[NDArray[np.floating]] = []  # log-probabilities [masks, B, labels]
    truth: list[int] = []
    scores = np.zeros((2, layers, layers))
    unreadable: list[str] = []
    codes: Counter[str] = Counter()
    size = max(engine.batches)
    with Decoders(1, manifest.preprocessing, limits, decode_seconds) as decoders, closing(inputs.reader()) as reader:
        for batch in track([chosen[at : at + size] for at in range(0, len(chosen), size)]):
            pixels = []
            for item in chain.from_iterable(reader.items(number, number + 1) for number in batch):
                try:
                    pixels.append(decoders.decode(item.read()).pixels)
                except (ServiceError, OSError) as error:
                    code, message = failure(error)
                    codes[code] += 1
                    unreadable.append(f"{printable(item.name)}: {message}")
                    continue
                truth.append(label_of_folder[class_name(item.name)] if folders else -1)
            if pixels:
                outputs = [engine.replacement.run(np.stack(pixels), mask) for mask in masks]
                scores += outputs[0][1].sum(0)
                values = logits(np.stack([output[0] for output in outputs]), label_set.embeddings, manifest.logit_scale)
                log_probabilities.append(np.log(np.maximum(probabilities(values), 1e-300)))
    if not log_probabilities:
        raise ReplayError(f"none of {len(chosen):,} images can be used; the first: {unreadable[0]}")

    all_logs = np.concatenate(log_probabilities, axis=1)
    clip_logs, predicted = all_logs[0], all_logs.argmax(-1)
    accuracies = (predicted == np.array(truth)).mean(-1) if folders else None
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
        failed=dict(codes.most_common()),
        skipped=inputs.skipped.lines(),
        labels=labels,
        warnings=to_notices(label_set.notices),
        top1=None if accuracies is None else accuracies[0],
        rows=rows,
        matrix=matrix(scores / len(truth)),
    )


def labels_of(folders: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    """Of each folder the number of its label. Raises `ReplayError` for those that have none."""
    numbers = {label: number for number, label in enumerate(labels)}
    unknown = [folder for folder in folders if class_label(folder) not in numbers] or unknown_ids(folders)
    if unknown:
        more = f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""
        raise ReplayError(
            f"these folders are not labels: {', '.join(map(printable, unknown[:5]))}{more}; name each folder after "
            "its label or the WordNet id of one of ImageNet's 1,000 classes, or give a pattern without classes, "
            "'photos/**/*.jpg'"
        )
    return {folder: numbers[class_label(folder)] for folder in folders}


def print_replay(result: Replay, console: Console) -> None:
    """Print what there is to say of the labels, a row per window and token type, then the files left out."""
    for warning in result.warnings:
        console.print(f"warning: {warning.message}", style="yellow", highlight=False, markup=False)
    last = len(result.matrix.cls) - 1
    accuracy = "" if result.top1 is None else f"; top-1 of the unmodified CLIP {result.top1:.2%}"
    console.print(f"{result.images:,} images, {len(result.labels):,} labels{accuracy}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("MLPs replaced")
    for heading in ("tokens", "top-1", "points", "same top-1 as CLIP", "divergence (nats)"):
        table.add_column(heading, justify="left" if heading == "tokens" else "right")
    for row in result.rows:
        accuracies = ["", ""]
        if row.top1 is not None and result.top1 is not None:
            accuracies = [f"{row.top1:.2%}", f"{100 * (row.top1 - result.top1):+.2f}"]
        table.add_row(
            f"{row.first} to {last}", row.tokens, *accuracies, f"{row.agreement:.2%}", f"{row.divergence:.4f}"
        )
    show(table, console)
    plain: dict[str, Any] = {"style": "yellow", "markup": False, "highlight": False, "soft_wrap": True}
    if result.unreadable:
        codes = ", ".join(f"{count:,} {code}" for code, count in result.failed.items())
        more = f" and {len(result.unreadable) - 3:,} more" if len(result.unreadable) > 3 else ""
        console.print(f"errors: {codes} ({'; '.join(result.unreadable[:3])}{more})", **plain)
    for line in result.skipped:
        console.print(line, **plain)
