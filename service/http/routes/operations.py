"""Routes for operators: reload and metrics."""

from __future__ import annotations

import asyncio
import signal

from fastapi import FastAPI, Request
from starlette.responses import Response

from vitrine.service.answers.reload import RELOAD_ERRORS, Serving
from vitrine.service.errors import ServiceError
from vitrine.service.http.asking import authorise, json_response
from vitrine.service.http.openapi import errors
from vitrine.service.operations import metrics
from vitrine.service.processes import workers
from vitrine.service.schemas.bundle import ReloadResponse


def add_operations(app: FastAPI, serving: Serving) -> None:
    """`/admin/reload`, if an admin key is set, and `/metrics`."""
    if serving.admin_keys:
        statuses = errors(401, 409, 503)
        app.post(
            "/admin/reload",
            summary="Load a new bundle, label sets and keys",
            response_model=ReloadResponse,
            responses=statuses,
            tags=["operate"],
        )(reload)
    app.get("/metrics", include_in_schema=False)(metrics_route)


async def reload(request: Request) -> Response:
    """Load the bundle, label sets and keys that the settings name, as they are on disk now. No request is lost."""
    serving = request.app.state.serving
    authorise(request, serving.admin_keys)
    try:
        current, previous = await serving.reload()
    except RELOAD_ERRORS as error:
        stays = f"; {serving.attributor.model.digest} stays in service" if serving.attributor else ""
        raise ServiceError("bundle_refused", f"{error}{stays}") from error
    workers.signal_others(signal.SIGHUP)
    return json_response(ReloadResponse(model=current, previous=previous))


async def metrics_route(request: Request) -> Response:
    """Prometheus' text format. Replaces BentoML's own series, which are labelled by raw path, junk paths included."""
    return Response(await asyncio.to_thread(metrics.exposition), media_type=metrics.CONTENT_TYPE)
