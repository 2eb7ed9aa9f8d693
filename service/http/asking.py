"""How every route asks: with a key, within the deadline, while there is a place and the client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.reload import Serving
from vitrine.service.errors import ServiceError, queue_full
from vitrine.service.operations.keys import Keys
from vitrine.service.schemas.classify import Prediction

Given = TypeVar("Given")
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


async def ask(
    request: Request,
    read: Callable[[], Awaitable[tuple[Given, Asked]]],
    answer: Callable[[Attributor, Given, Asked, str], Coroutine[Any, Any, Answer]],
) -> Answer:
    """The attributor's answer to what is read, within the deadline and while the client is there."""
    with served(request) as attributor:
        async with _deadline(request):
            given, asked = await read()
            return await _unless_gone(request, answer(attributor, given, asked, request.scope["request_id"]))


@contextmanager
def served(request: Request) -> Iterator[Attributor]:
    """A lease of the attributor, for those who may have it, while it has places: no body is read for a refusal."""
    serving: Serving = request.app.state.serving
    authorise(request, serving.api_keys)
    with serving.lease() as attributor:
        if request.method == "POST" and attributor.is_full:
            raise queue_full()
        yield attributor


def authorise(request: Request, keys: Keys) -> None:
    """Before anything of the body is read. Raises `ServiceError` unauthorized."""
    if keys and not keys.accept(request.headers.get("authorization", "")):
        raise ServiceError(
            "unauthorized", "send a valid key: `Authorization: Bearer KEY`", headers={"WWW-Authenticate": "Bearer"}
        )


@asynccontextmanager
async def _deadline(request: Request) -> AsyncIterator[None]:
    """Cancel what takes longer than the deadline, slow uploads included."""
    seconds = request.app.state.settings.deadline_seconds
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ServiceError("deadline_exceeded", f"no answer within {seconds:g} s") from None


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer, which is cancelled when the client goes away: its place is for others then.

    Raises `ClientDisconnect`.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, leaving = asyncio.create_task(answer), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, leaving):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


def log_predictions(request: Request, *predictions: list[Prediction]) -> None:
    """Put what was predicted into the request's log line, if that is set."""
    if request.app.state.settings.log_labels:
        request.scope["vitrine.log"] = {"predicted": [found[0].label for found in predictions]}


def json_response(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")
