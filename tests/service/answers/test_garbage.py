"""What requests and bundles leave in memory, which every full garbage collection has to scan."""

import asyncio
import gc

from vitrine.service.answers.reload import Serving
from vitrine.service.operations.settings import Settings

TIMERS = """
import asyncio, httpx
from bentoml._internal.configuration.containers import BentoMLContainer
from _bentoml_impl.loader import load

service = load("vitrine.service.app:Vitrine", standalone_load=True)

def is_recording():
    return BentoMLContainer.tracer_provider.get().get_tracer("any").start_span("any").is_recording()

async def ask():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(service.to_asgi()), base_url="http://here") as http:
        for path in ("/livez", "/v1/model", "/nowhere"):
            assert (await http.get(path)).status_code in (200, 404, 503)
    print(is_recording(), [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()])

asyncio.run(ask())
"""


def test_full_collections_skip_what_is_loaded(bundle_path):
    async def serve():
        async with Serving(Settings(bundle=bundle_path)) as serving:
            assert gc.get_freeze_count() > 10_000
            await serving.reload()
            assert gc.get_freeze_count() > 10_000
        assert gc.get_freeze_count() == 0

    asyncio.run(serve())


def test_an_answered_request_leaves_no_timer_and_no_span(run_python, bundle_path):
    """BentoML's own timers would keep each request's context for a minute: `service.app.NoTimeout`."""
    finished = run_python("-c", TIMERS, VITRINE_BUNDLE=bundle_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "False []"
