"""What the routes share: the key, admission, the deadline, and cancellation when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.reload import Serving
from vitrine.service.answers.serialise import json_text
from vitrine.service.errors import ServiceError, queue_full
from vitrine.service.operations.keys import Keys
from vitrine.service.schemas.classify import ClassifyRequest, Prediction
from vitrine.service.schemas.embed import EmbedRequest

Images = TypeVar("Images")
Payload = TypeVar("Payload")
Answer = TypeVar("Answer")


async def handle(
    request: Request,
    read: Callable[[], Awaitable[tuple[Images, Payload]]],
    answer: Callable[[Attributor, Images, Payload, str], Coroutine[Any, Any, Answer]],
) -> Answer:
    """Read the body and answer it, within the deadline and while the client is connected."""
    with lease_attributor(request) as attributor:
        async with _deadline(request):
            images, payload = await read()
            log_edit(request, attributor, payload)
            return await _until_disconnect(request, answer(attributor, images, payload, request.scope["request_id"]))


@contextmanager
def lease_attributor(request: Request) -> Iterator[Attributor]:
    """Lease the attributor to an authorised request if it has a place. A refused request's body is not read."""
    serving: Serving = request.app.state.serving
    authorise(request, serving.api_keys)
    with serving.lease() as attributor:
        if request.method == "POST" and attributor.is_full:
            raise queue_full()
        yield attributor


def authorise(request: Request, keys: Keys) -> None:
    """Check the key, before any of the body is read. Raises `ServiceError` unauthorized."""
    if keys and not keys.accept(request.headers.get("authorization", "")):
        raise ServiceError(
            "unauthorized",
            "the key is missing or not valid; send `Authorization: Bearer KEY`",
            headers={"WWW-Authenticate": "Bearer"},
        )


@asynccontextmanager
async def _deadline(request: Request) -> AsyncIterator[None]:
    """Cancel the request at its deadline, slow uploads included."""
    seconds = request.app.state.settings.deadline_seconds
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ServiceError(
            "deadline_exceeded", f"the request took longer than {seconds:g} s; send it again, or request less"
        ) from None


async def _until_disconnect(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer. It is cancelled when the client disconnects, which frees its place.

    Raises `ClientDisconnect`.
    """

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, disconnect = asyncio.create_task(answer), asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, disconnect):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


def log_edit(request: Request, attributor: Attributor, payload: Any) -> None:
    """Add the edit that a request is answered with to its log line, whatever becomes of it; unknown names are not
    logged."""
    if isinstance(payload, ClassifyRequest | EmbedRequest):
        name = attributor.edits.default if payload.edit is None else payload.edit
        if (served := attributor.edits.named.get(name or "")) is not None:
            request.scope.setdefault("vitrine.log", {}).update(edit=name, edit_digest=served.edit.digest)


def log_predictions(request: Request, *predictions: list[Prediction]) -> None:
    """Add the predicted labels to the request's log line, if `log_labels` is set."""
    if request.app.state.settings.log_labels:
        predicted = [ranked[0].label for ranked in predictions]
        request.scope.setdefault("vitrine.log", {})["predicted"] = predicted


def json_response(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


class PiecesResponse(Response):
    """JSON in pieces, which are sent as they are: to join a large answer would hold up the event loop."""

    def __init__(self, pieces: list[bytes]) -> None:
        size = str(sum(map(len, pieces)))
        super().__init__(media_type="application/json", headers={"content-length": size})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def large_json_response(answer: BaseModel) -> Response:
    """The same for an answer so large that making its text would delay other requests."""
    return Response(await asyncio.to_thread(json_text, answer), media_type="application/json")
