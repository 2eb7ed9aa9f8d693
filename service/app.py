"""The BentoML service: process, workers and probes are BentoML's, everything else is `service.routes`.

bentoml serve service.app:Vitrine        (or `vitrine serve`, which also looks after the workers: `service.supervisor`)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bentoml
from bentoml._internal.configuration.containers import BentoMLContainer
from opentelemetry import trace
from starlette.types import ASGIApp, Receive, Scope, Send

from service import logs
from service.routes import create_app
from service.settings import load_settings

settings = load_settings()
logs.configure(settings.log_format)
app = create_app(settings)
BENTOML = ("/livez", "/readyz", "/healthz", "/schema.json")
tracing: dict[str, Any] = {}
if settings.trace_endpoint:
    exporter = {"protocol": "http", "endpoint": settings.trace_endpoint}
    tracing = {"tracing": {"exporter_type": "otlp", "sample_rate": settings.trace_share, "otlp": exporter}}


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
    traffic={"timeout": int(settings.deadline_seconds) + 30},
    metrics={"enabled": False},  # `service.routes` has /metrics
    logging={"access": {"enabled": False}},  # `service.middleware` has its own
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
        raise NotImplementedError("service.routes answers this")

    @bentoml.api(route="/v1/classify")
    def classify(self, image: Path, request: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006
        """Zero-shot prediction of one image."""
        raise NotImplementedError("service.routes answers this")


service: Any = Vitrine  # what the decorator makes of the class
service.add_asgi_middleware(Front)
