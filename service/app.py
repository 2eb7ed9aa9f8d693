"""The BentoML service: process, workers and probes are BentoML's, everything else is `service.http.application`.

bentoml serve vitrine.service.app:Vitrine

or `vitrine serve`, which also looks after the workers (`service.processes.supervisor`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import bentoml
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.server.http import traffic
from opentelemetry import trace
from starlette.types import ASGIApp, Receive, Scope, Send

from vitrine.service.http.application import create_app
from vitrine.service.operations import logs
from vitrine.service.operations.settings import load_settings

settings = load_settings()
logs.configure(settings.log_format)
app = create_app(settings)
BENTOML = ("/livez", "/readyz", "/healthz", "/schema.json")
tracing: dict[str, Any] = {}
if settings.trace_endpoint:
    exporter = {"protocol": "http", "endpoint": settings.trace_endpoint}
    tracing = {"tracing": {"exporter_type": "otlp", "sample_rate": settings.trace_share, "otlp": exporter}}
else:  # BentoML would record three spans of every request all the same, for nobody; the caller's trace is still known
    os.environ["OTEL_SDK_DISABLED"] = "true"


class Untimed:
    """In the place of BentoML's time limit; `service.http.application` has the deadline.

    BentoML sets a timer for every request and never takes it back: each keeps the request's context and span in memory
    for a minute, thousands of them under load, and every full collection goes through them all with the interpreter
    held, for a quarter of a second.
    """

    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


traffic.TimeoutMiddleware = Untimed  # type: ignore[misc, assignment]


class Front:
    """All but BentoML's probes and schema is answered by our routes, and by nobody before them: not by BentoML's own
    way of reading files, which would fetch a URL if it got one in place of a file."""

    def __init__(self, bento: ASGIApp) -> None:
        self.bento = bento

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ours = scope["type"] == "http" and scope["path"] not in BENTOML
        await (app if ours else self.bento)(scope, receive, send)


@bentoml.service(
    name="vitrine",
    workers=settings.workers,
    metrics={"enabled": False},  # `service.http.application` has /metrics
    logging={"access": {"enabled": False}},  # `service.http.middleware` has its own
    **tracing,
)
@bentoml.asgi_app(app)
class Vitrine:
    """Readiness is the app's: a bundle opened, checked and warmed up.

    The methods below are what BentoML's own client learns from /schema.json; their requests go through `Front`.
    """

    def __init__(self) -> None:
        self.traces = BentoMLContainer.tracer_provider.get()
        trace.set_tracer_provider(self.traces)  # so that stages join its spans

    @bentoml.on_shutdown
    def send_last_traces(self) -> None:
        """A worker ends by a signal, which would leave those of the last seconds unsent."""
        self.traces.force_flush(timeout_millis=3_000)

    def __is_ready__(self) -> bool:
        return app.state.serving.attributor is not None

    @bentoml.api(route="/v1/attribute")
    def attribute(self, image: Path, request: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006
        """Zero-shot prediction of one image, and the account of it."""
        raise NotImplementedError("service.http.application answers this")

    @bentoml.api(route="/v1/classify")
    def classify(self, image: Path, request: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006
        """Zero-shot prediction of one image."""
        raise NotImplementedError("service.http.application answers this")


service: Any = Vitrine  # what the decorator makes of the class
service.add_asgi_middleware(Front)
