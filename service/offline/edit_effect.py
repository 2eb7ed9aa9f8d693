"""What an edit does to predictions on images of yours: evidence for it, or against it.

Inputs are those of `vitrine replay`. Of a folder with one folder of images a label accuracies are measured, too, class
by class: what the edit repairs, and what it costs the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from itertools import chain

import numpy as np
from pydantic import BaseModel, Field
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrine.models.account.ledger import logits
from vitrine.models.errors import VitrineError
from vitrine.models.files.names import printable
from vitrine.models.images.decode import ImageLimits
from vitrine.models.inputs.classes import by_class, class_name
from vitrine.models.inputs.imagenet import class_label
from vitrine.models.inputs.source import Files, Source
from vitrine.models.tables import show
from vitrine.service.engine.decoders import Decoders
from vitrine.service.engine.edits import ServedEdit, run_edited
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import LabelEncoder
from vitrine.service.errors import ServiceError
from vitrine.service.offline.failures import failure
from vitrine.service.offline.replay import labels_of


class EffectError(VitrineError, ValueError):
    """The effect cannot be measured; the message says why."""


class ClassEffect(BaseModel):
    """Of the images of one label."""

    label: str
    images: int
    before: float = Field(description="share of images predicted as this label")
    after: float


class Effect(BaseModel):
    """Predictions before and after."""

    images: int
    failed: dict[str, int] = Field(description="number of images that cannot be used, by error code")
    labels: list[str]
    templates: list[str]
    applied: float = Field(description="share of images that the edit was applied to")
    changed: float = Field(description="share of images whose top-1 label changes")
    before: float | None = Field(description="top-1 accuracy; null: the images have no labels of their own")
    after: float | None
    classes: list[ClassEffect]


def measure(
    engine: Engine,
    edit: ServedEdit,
    inputs: Source,
    limits: ImageLimits,
    decode_seconds: float = 10.0,
    labels: Sequence[str] | None = None,
    track: Callable[[Sequence[range]], Iterable[range]] = iter,
) -> Effect:
    """The effect of an edit on all images of `inputs`.

    Args:
        labels: default: the names of the folders, ImageNet's for WordNet ids; without folders the bundle's labels.
        track: yields the batches of images' numbers, and may show progress.

    Raises:
        ReplayError: a folder is no label.
        EffectError: no image can be used, or the edit cannot be made with this bundle.
        InputError: what is read proves to be damaged.
    """
    if edit.problem:
        raise EffectError(edit.problem)
    manifest, folders = engine.bundle.manifest, tuple[str, ...]()
    if isinstance(inputs, Files) and inputs.kind == "folder":
        folders, inputs = by_class(inputs)
    labels = list(labels or dict.fromkeys(map(class_label, folders)) or manifest.text.labels)
    label_of_folder = labels_of(folders, labels)
    embeddings = LabelEncoder(engine, capacity=len(labels)).encode(labels, manifest.text.templates)
    size = max(engine.batches)
    found: list[tuple[int, int, int, bool]] = []  # true label, predicted before and after, whether it was applied
    failed: Counter[str] = Counter()
    first_failure = ""
    with Decoders(1, manifest.preprocessing, limits, decode_seconds) as decoders, closing(inputs.reader()) as reader:
        for batch in track([range(at, min(at + size, len(inputs))) for at in range(0, len(inputs), size)]):
            pixels, truth = [], []
            for item in chain.from_iterable(reader.items(number, number + 1) for number in batch):
                try:
                    pixels.append(decoders.decode(item.read()).pixels)
                except (ServiceError, OSError) as error:
                    code, message = failure(error)
                    failed[code] += 1
                    first_failure = first_failure or f"{printable(item.name)}: {message}"
                    continue
                truth.append(label_of_folder[class_name(item.name)] if folders else -1)
            if pixels:
                plain, edited = engine.explain(np.stack(pixels)), run_edited(engine, edit, np.stack(pixels), embeddings)
                runs = ([one.embedding for one in plain], [one.parts.embedding for one in edited])
                before, after = (logits(np.stack(run), embeddings, manifest.logit_scale).argmax(-1) for run in runs)
                applied = [one.applied for one in edited]
                found += zip(truth, before.tolist(), after.tolist(), applied, strict=True)
    if not found:
        raise EffectError(f"none of {len(inputs):,} images can be used; the first: {first_failure}")
    true, first, last, was_applied = (np.array(part) for part in zip(*found, strict=True))
    classes = [
        ClassEffect(
            label=labels[number],
            images=int((true == number).sum()),
            before=float((first[true == number] == number).mean()),
            after=float((last[true == number] == number).mean()),
        )
        for number in (np.unique(true).tolist() if folders else [])
    ]
    return Effect(
        images=len(found),
        failed=dict(failed.most_common()),
        labels=labels,
        templates=list(manifest.text.templates),
        applied=float(was_applied.mean()),
        changed=float((first != last).mean()),
        before=float((first == true).mean()) if folders else None,
        after=float((last == true).mean()) if folders else None,
        classes=classes,
    )


def print_effect(effect: Effect, console: Console) -> None:
    """Print a sentence, and a row per class, the one that was worst first."""
    line = f"{effect.images:,} images: the edit is applied to {effect.applied:.1%} and changes the top-1 label of "
    line += f"{effect.changed:.1%}"
    if effect.before is not None and effect.after is not None:
        line += f"; top-1 {effect.before:.2%} before, {effect.after:.2%} after"
    console.print(line, highlight=False)
    if effect.classes:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("label")
        for heading in ("images", "before", "after", "points"):
            table.add_column(heading, justify="right")
        for one in sorted(effect.classes, key=lambda one: one.before):
            points = f"{100 * (one.after - one.before):+.2f}"
            table.add_row(Text(one.label), f"{one.images:,}", f"{one.before:.2%}", f"{one.after:.2%}", points)
        show(table, console)
    if effect.failed:
        codes = ", ".join(f"{count:,} {code}" for code, count in effect.failed.items())
        console.print(f"left out: {codes}", style="yellow", highlight=False, soft_wrap=True)
