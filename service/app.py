"""The BentoML service: process, workers and probes are BentoML's, everything else is `service.routes`.

bentoml serve service.app:Vitrine        (or `vitrine serve`)
"""

from __future__ import annotations

import bentoml

from service.routes import create_app
from service.settings import load_settings

settings = load_settings()
app = create_app(settings)


@bentoml.service(
    name="vitrine",
    traffic={"timeout": int(settings.deadline_seconds) + 30},
    metrics={"enabled": False},  # `service.routes` has /metrics
)
@bentoml.asgi_app(app)
class Vitrine:
    """Readiness is the app's: a bundle opened, checked and warmed up."""

    def __is_ready__(self) -> bool:
        return app.state.attributor is not None
