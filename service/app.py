"""The BentoML service. BentoML provides the process, workers and probes, `service.http.application` the rest.

bentoml serve vitrine.service.app:Vitrine

or `vitrine serve`, which also supervises the workers (`service.processes.supervisor`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import bentoml
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.server.http import traffic
from bentoml._internal.utils.analytics import usage_stats
from opentelemetry import trace
from starlette.types import ASGIApp, Receive, Scope, Send

from vitrine.service.http import connection
from vitrine.service.http.application import create_app
from vitrine.service.operations import logs
from vitrine.service.operations.settings import load_settings
from vitrine.service.processes import metrics_folder

usage_stats.do_not_track.cache_clear()  # `bentoml serve` has asked before Vitrine was imported, which says no
if "serve" in sys.argv:  # here, in the parent, before BentoML makes one for all servers
    metrics_folder.use_own_folder()
settings = load_settings()
logs.configure(settings.log_format)
app = create_app(settings)
connection.install(settings)  # BentoML configures uvicorn after it has imported this module
BENTOML_PATHS = ("/livez", "/readyz", "/healthz", "/schema.json")
tracing: dict[str, Any] = {}
if settings.trace_endpoint:
    exporter = {"protocol": "http", "endpoint": settings.trace_endpoint}
    tracing = {"tracing": {"exporter_type": "otlp", "sample_rate": settings.trace_share, "otlp": exporter}}
else:  # BentoML would still record three spans per request, which nobody reads; the caller's trace stays known
    os.environ["OTEL_SDK_DISABLED"] = "true"


class NoTimeout:
    """Replaces BentoML's timeout middleware; `service.http.asking` enforces the deadline.

    BentoML sets a timer for every request and never cancels it. Each timer keeps the request's context and span in
    memory for a minute, thousands of them under load, and every full garbage collection traverses them all while
    holding the GIL, for a quarter of a second.
    """

    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


traffic.TimeoutMiddleware = NoTimeout  # type: ignore[misc, assignment]


class DispatchMiddleware:
    """Sends every request except BentoML's probes and schema straight to our routes.

    BentoML's own file handling must not see them: it would fetch a URL sent instead of a file.
    """

    def __init__(self, bentoml_app: ASGIApp) -> None:
        self.bentoml_app = bentoml_app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_own = scope["type"] == "http" and scope["path"] not in BENTOML_PATHS
        await (app if is_own else self.bentoml_app)(scope, receive, send)


@bentoml.service(
    name="vitrine",
    workers=settings.workers,
    metrics={"enabled": False},  # `service.http.application` has /metrics
    logging={"access": {"enabled": False}},  # `service.http.middleware` writes its own access log
    **tracing,
)
@bentoml.asgi_app(app)
class Vitrine:
    """Ready once the app has opened, checked and warmed up a bundle.

    The methods below describe the API to BentoML's own client, in /schema.json; their requests go through
    `DispatchMiddleware`.
    """

    def __init__(self) -> None:
        self.tracer_provider = BentoMLContainer.tracer_provider.get()
        trace.set_tracer_provider(self.tracer_provider)  # so that stages are part of its spans

    @bentoml.on_shutdown
    def flush_traces(self) -> None:
        """Send the traces of the last seconds, which are lost otherwise when a signal ends the worker."""
        self.tracer_provider.force_flush(timeout_millis=3_000)

    def __is_ready__(self) -> bool:
        attributor = app.state.serving.attributor
        return attributor is not None and attributor.can_decode()

    @bentoml.api(route="/v1/attribute")
    def attribute(self, image: Path, request: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006
        """Zero-shot prediction of one image, and its account."""
        raise NotImplementedError("service.http.application answers this")

    @bentoml.api(route="/v1/classify")
    def classify(self, image: Path, request: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006
        """Zero-shot prediction of one image."""
        raise NotImplementedError("service.http.application answers this")


service: Any = Vitrine  # the decorator replaces the class
service.add_asgi_middleware(DispatchMiddleware)
