"""One circuit of many images: what their predictions have in common. `vitrine circuit FOLDER`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from itertools import chain

import numpy as np

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.errors import VitrineError
from vitrine.models.files.names import display, printable
from vitrine.models.inputs.imagenet import class_label
from vitrine.models.inputs.source import Files, Source
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.circuit import answer_circuit, check_circuit
from vitrine.service.answers.circuit_groups import MeanCircuit, grouped
from vitrine.service.errors import ServiceError
from vitrine.service.offline.failures import failure
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.circuit import CircuitRequest
from vitrine.service.schemas.circuit_groups import GroupedCircuit

IDENTITY = "command-line"


class ClassCircuitError(VitrineError, ValueError):
    """No image can be used; the message says why."""


async def class_circuit(
    bundle: Bundle,
    settings: Settings,
    inputs: Source,
    request: CircuitRequest,
    count: int | None = None,
    seed: int = 0,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> GroupedCircuit:
    """The mean circuit of `count` randomly chosen images, or of all, one after the other.

    Without a target it is the label that the inputs' folder is named after, by itself or by a WordNet id of
    ImageNet's; where there is none, each image's own top-1.

    Args:
        track: yields the images' numbers, and may show progress.

    Raises:
        ServiceError: the request cannot be answered, whatever the image.
        ClassCircuitError: no image can be used.
        InputError: what is read proves to be damaged.
    """
    chosen = list(range(len(inputs)))
    if count is not None and count < len(inputs):
        chosen = sorted(np.random.default_rng(seed).choice(len(inputs), count, replace=False).tolist())
    unreadable: list[str] = []
    codes: Counter[str] = Counter()
    mean = MeanCircuit()
    async with Attributor(bundle, settings) as attributor:
        if request.target is None:
            request = request.model_copy(update={"target": _folder_label(inputs, attributor.texts(request)[0])})
        check_circuit(attributor, request)
        with closing(inputs.reader()) as reader:
            for item in chain.from_iterable(reader.items(number, number + 1) for number in track(chosen)):
                try:
                    content = await asyncio.to_thread(item.read)
                    answer = await answer_circuit(attributor, content, request, IDENTITY)
                except (ServiceError, OSError) as error:
                    code, message = failure(error)
                    codes[code] += 1
                    unreadable.append(f"{printable(item.name)}: {message}")
                    continue
                mean.add(grouped(answer))
    if not mean.images:
        raise ClassCircuitError(f"none of {len(chosen):,} images can be used; the first: {unreadable[0]}")
    more = {"failed": dict(codes.most_common()), "unreadable": unreadable, "skipped": inputs.skipped.lines()}
    return mean.mean().model_copy(update=more)


def _folder_label(inputs: Source, labels: Sequence[str]) -> str | None:
    """The label that the folder of images is named after."""
    if not (isinstance(inputs, Files) and inputs.kind == "folder"):
        return None
    name = class_label(display(inputs.root.name))
    return name if name in labels else None
