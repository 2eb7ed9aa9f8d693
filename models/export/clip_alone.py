"""A bundle from a CLIP alone, without a CLT: `vitrine export --clip`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.label_sets import NamedLabels
from vitrine.models.bundle.layout import Variant
from vitrine.models.bundle.manifest import Metrics
from vitrine.models.clip.loading import Clip
from vitrine.models.export.export import Provenance, export_bundle
from vitrine.models.graph.onnx_file import ExportError
from vitrine.models.images.decode import TRUSTED, decode
from vitrine.models.images.errors import ImageError
from vitrine.models.images.frame import to_pixels
from vitrine.models.inputs.errors import Unreadable
from vitrine.models.inputs.imagenet import class_labels
from vitrine.models.inputs.source import Source
from vitrine.models.progress import Progress

TEMPLATES = ("a photo of a {}.",)
VARIANTS: tuple[Variant, ...] = ("int8", "fp16")
BATCH = 16  # images


def export_clip(
    clip: Clip,
    out: Path,
    labels: Sequence[str] | None,
    label_sets: Mapping[str, NamedLabels],
    images: Sequence[Tensor],
    log: Callable[[str], object],
    progress: Progress,
) -> Bundle:
    """Write the bundle `out`, checked against torch, with source accounts and interventions.

    Args:
        labels: of the bundle; None: ImageNet's classes.
        images: batches of normalised pixels, on which int8 and fp16 must agree with float32; none: they are left out,
            which is reported to `log`, as is a variant that does not agree.

    Raises `ExportError`, `FileError` (see `export_bundle`).
    """
    if not images:
        log(f"{' and '.join(VARIANTS)} are left out: there are no --images to check them on")
    of_clip = Provenance(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", f"{clip.name}-{clip.weights}"),
        description=f"CLIP {clip.name} ({clip.weights}), unmodified: accounts by layer, without a CLT.",
        labels=list(labels or class_labels()),
        templates=TEMPLATES,
        data=None,
        recipe="",
        metrics=Metrics(),
        licence="the licence of the CLIP's weights",
    )
    return export_bundle(
        clip,
        None,
        None,
        of_clip,
        out,
        label_sets=label_sets,
        variants=VARIANTS if images else (),
        calibration=images,
        sources=True,
        rerun=True,
        log=log,
        progress=progress,
    )


def read_images(
    inputs: Source, count: int, clip: Clip, log: Callable[[str], object], progress: Progress
) -> list[Tensor]:
    """At most `count` of the images, drawn at random, as batches of normalised pixels. Those that cannot be read are
    left out, and `log` is told how many. Raises `ExportError` if none can, `InputError` if the inputs are damaged."""
    chosen = list(range(len(inputs)))
    if count < len(inputs):
        chosen = sorted(np.random.default_rng(0).choice(len(inputs), count, replace=False).tolist())
    task, pixels, unreadable = progress.task("images to check on", len(chosen), "images"), list[Tensor](), list[str]()
    with closing(inputs.reader()) as reader:
        for item in chain.from_iterable(reader.items(number, number + 1) for number in chosen):
            try:
                image = decode(item.read(), TRUSTED).image
                pixels.append(torch.from_numpy(to_pixels(image, clip.preprocessing, TRUSTED)))
            except (ImageError, Unreadable, OSError) as error:
                unreadable.append(f"{item.name}: {error}")
            task.advance()
    if not pixels:
        first = f"; the first: {unreadable[0]}" if unreadable else ""
        raise ExportError(f"none of {len(chosen):,} images can be used{first}")
    if unreadable:
        log(f"{len(unreadable):,} of {len(chosen):,} images could not be read; the first: {unreadable[0]}")
    return [torch.stack(pixels[at : at + BATCH]) for at in range(0, len(pixels), BATCH)]
