"""Several images whose answers are all wanted: the first that cannot be answered fails the request, by its name."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from vitrine.service.errors import ServiceError

Answer = TypeVar("Answer")


async def all_of(
    images: Sequence[bytes], answer: Callable[[bytes], Awaitable[Answer]], names: Sequence[str] = ()
) -> list[Answer]:
    """The answer of every image, asked for at once. names: of the images, for errors; without, there is one image.

    Raises `ServiceError` of the first image that has one, with its name in the message and as the field in the details.
    """
    if not names:
        return [await answer(image) for image in images]

    async def one(image: bytes) -> Answer | ServiceError:
        try:
            return await answer(image)
        except ServiceError as error:
            return error

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(image)) for image in images]
    answers: list[Answer] = []
    for name, task in zip(names, tasks, strict=True):
        found = task.result()
        if isinstance(found, ServiceError):
            details = [{"field": name, "problem": found.message}]
            raise ServiceError(found.code, f"{name}: {found.message}", details, found.headers) from found
        answers.append(found)
    return answers
