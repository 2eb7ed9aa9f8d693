"""The BentoML service: process, workers, probes and /metrics are BentoML's, everything under /v1 is `service.routes`.

bentoml serve service.app:Vitrine        (or `vitrine serve`)
"""

from __future__ import annotations

import bentoml

from service.routes import create_app
from service.settings import load_settings

settings = load_settings()
app = create_app(settings)


@bentoml.service(name="vitrine", traffic={"timeout": int(settings.deadline_seconds) + 30})
@bentoml.asgi_app(app)
class Vitrine:
    """Readiness is the app's: a bundle opened, checked and warmed up."""

    def __is_ready__(self) -> bool:
        return app.state.attributor is not None
