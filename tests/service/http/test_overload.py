"""What a healthy server does not show: the same app in this process, with its engine blocked."""

import asyncio
import json
import threading
import tracemalloc
from contextlib import AsyncExitStack

import httpx
import pytest
from prometheus_client import REGISTRY

from broken import copy, short_fold
from vitrine.models.bundle.bundle import BundleError
from vitrine.models.bundle.label_sets import LabelSetError
from vitrine.service.answers.attributor import Attributor
from vitrine.service.engine.engine import Engine
from vitrine.service.http.application import create_app
from vitrine.service.http.routes import knowledge
from vitrine.service.operations.settings import Settings


def talk_to(app, conversation, ready=True):
    """The result of `conversation(client)` with `app`, after (or before) it has loaded its bundle."""

    async def talk():
        transport, headers = httpx.ASGITransport(app, raise_app_exceptions=False), {"X-Request-ID": "mine"}
        async with AsyncExitStack() as stack:
            if ready:
                await stack.enter_async_context(app.router.lifespan_context(app))
            return await conversation(
                await stack.enter_async_context(
                    httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)
                )
            )

    return asyncio.run(talk())


def test_invalid_label_sets_stop_the_start(bundle_path, tmp_path):
    (tmp_path / "pets.json").write_text('{"labels": []}')
    app = create_app(Settings(bundle=bundle_path, label_sets=tmp_path))
    with pytest.raises(LabelSetError, match=r"pets\.json: labels: "):
        talk_to(app, lambda client: client.get("/v1/model"))


def error_of(response):
    error = response.json()["error"]
    assert response.headers["x-request-id"] == error["request_id"] == "mine"
    return response.status_code, error["code"]


def test_a_full_queue_is_reported_at_once(bundle_path, picture, gate):
    app = create_app(Settings(bundle=bundle_path, queue_size=1, batch_size=1))

    async def conversation(client):
        gate.clear()
        batcher, answered = app.state.serving.attributor.batcher, []
        for waiting in (0, 1):  # the first runs, the second waits
            answered.append(asyncio.create_task(client.post("/v1/attribute", files={"image": picture()})))
            while metric("vitrine_stage_seconds_count", stage="labels") < before + 1 + waiting:
                await asyncio.sleep(0.01)
            while batcher.waiting != waiting:
                await asyncio.sleep(0.01)
        refused = await client.post("/v1/attribute", files={"image": picture()})
        gate.set()
        return [*await asyncio.gather(*answered), refused]

    def metric(name, **labels):
        return REGISTRY.get_sample_value(name, labels) or 0

    before = metric("vitrine_stage_seconds_count", stage="labels")
    *answered, refused = talk_to(app, conversation)
    assert [response.status_code for response in answered] == [200, 200]
    assert error_of(refused) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1


def test_a_full_service_refuses_without_reading_the_body(bundle_path, picture, gate):
    app = create_app(Settings(bundle=bundle_path, queue_size=1, batch_size=1))

    async def conversation(client):
        gate.clear()
        waiting = [asyncio.create_task(client.post("/v1/classify", files={"image": picture()})) for _ in range(2)]
        while not app.state.serving.attributor.is_full:
            await asyncio.sleep(0.01)

        async def unread():
            raise AssertionError("read")
            yield b""

        refused = []
        for path in ("attribute", "attribute:batch", "classify", "embed"):
            headers = {"content-type": "application/json"}
            refused.append(await client.post(f"/v1/{path}", content=unread(), headers=headers))
        others = [await client.get(f"/v1/{path}") for path in ("model", "labels")]
        gate.set()
        return refused, others, await asyncio.gather(*waiting)

    refused, others, answered = talk_to(app, conversation)
    assert [error_of(response) for response in refused] == [(429, "queue_full")] * 4
    assert [response.status_code for response in (*others, *answered)] == [200] * 4


def test_a_request_need_not_wait_for_all_images_of_a_batch(bundle_path, picture, monkeypatch):
    decode, gate, order = Attributor.decode, threading.Event(), []

    def recorded(self, image):
        order.append(image)
        gate.wait(30)
        return decode(self, image)

    monkeypatch.setattr(Attributor, "decode", recorded)
    app = create_app(Settings(bundle=bundle_path, decode_threads=1))
    alone = picture(seed=100)

    async def conversation(client):
        files = [("image", (str(seed), picture(seed=seed))) for seed in range(8)]
        batch = asyncio.create_task(client.post("/v1/attribute:batch", files=files))
        while app.state.serving.attributor._in_flight < 8:
            await asyncio.sleep(0.01)
        single = asyncio.create_task(client.post("/v1/attribute", files={"image": alone}))
        while app.state.serving.attributor._in_flight < 9:
            await asyncio.sleep(0.01)
        gate.set()
        return await asyncio.gather(batch, single)

    batch, single = talk_to(app, conversation)
    assert [result["status"] for result in batch.json()["results"]] == [200] * 8
    assert single.status_code == 200
    assert order.index(alone) <= 2


def test_images_that_wait_for_decoding_are_counted_too(bundle_path, picture, monkeypatch):
    decode, gate = Attributor.decode, threading.Event()
    monkeypatch.setattr(Attributor, "decode", lambda self, image: gate.wait(30) and decode(self, image))
    app = create_app(Settings(bundle=bundle_path, queue_size=2, batch_size=1, decode_threads=1))

    async def conversation(client):
        waiting = [asyncio.create_task(client.post("/v1/classify", files={"image": picture()})) for _ in range(3)]
        while app.state.serving.attributor._in_flight < 3:
            await asyncio.sleep(0.01)
        refused = await client.post("/v1/classify", files={"image": picture()})
        gate.set()
        answered = await asyncio.gather(*waiting)
        return refused, [*answered, await client.post("/v1/classify", files={"image": picture()})]

    refused, answered = talk_to(app, conversation)
    assert error_of(refused) == (429, "queue_full")
    assert [response.status_code for response in answered] == [200] * 4


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": [1] * 50_000},
        {"templates": ["a"] * 50_000},
        {"explain": {"targets": [1] * 50_000}},
        {f"field {i}": 1 for i in range(50_000)},
    ],
    ids=["labels", "templates", "targets", "unknown fields"],
)
def test_many_mistakes_take_no_memory(bundle_path, fields):
    """16 MiB hold 8 million of them: one by one they would take gigabytes, and block the event loop for a minute."""

    async def conversation(client):
        body = json.dumps({"image_base64": "AAAA", **fields})
        tracemalloc.start()
        response = await client.post("/v1/attribute", content=body, headers={"content-type": "application/json"})
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return response, peak

    response, peak = talk_to(create_app(Settings(bundle=bundle_path)), conversation)
    assert error_of(response) == (400, "invalid_request")
    assert peak < 20 * 2**20


@pytest.mark.parametrize("path", ["/v1/attribute", "/v1/classify"])
def test_the_deadline_is_kept(bundle_path, picture, gate, path):
    async def conversation(client):
        gate.clear()
        response = await client.post(path, files={"image": picture()})
        gate.set()
        return response

    response = talk_to(create_app(Settings(bundle=bundle_path, deadline_seconds=0.1)), conversation)
    assert error_of(response) == (504, "deadline_exceeded")


def test_the_deadline_covers_a_slow_upload(bundle_path):
    async def conversation(client):
        async def slow():
            for _ in range(500):
                yield b" "
                await asyncio.sleep(0.01)

        return await client.post("/v1/attribute", content=slow(), headers={"content-type": "application/json"})

    response = talk_to(create_app(Settings(bundle=bundle_path, deadline_seconds=0.1)), conversation)
    assert error_of(response) == (504, "deadline_exceeded")


def test_an_unforeseen_error_is_logged_under_its_request_id_and_not_exposed(bundle_path, picture, monkeypatch, caplog):
    async def fail(*_):
        raise RuntimeError("a secret")

    monkeypatch.setattr(Attributor, "infer", fail)
    app = create_app(Settings(bundle=bundle_path))
    response = talk_to(app, lambda client: client.post("/v1/attribute", files={"image": picture()}))
    assert error_of(response) == (500, "internal")
    assert "secret" not in response.text
    assert any("mine" in record.getMessage() and record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/attribute"), ("POST", "/v1/classify"), ("GET", "/v1/model")]
)
def test_before_the_bundle_is_loaded_requests_are_refused_as_not_ready(bundle_path, method, path):
    app = create_app(Settings(bundle=bundle_path))
    response = talk_to(app, lambda client: client.request(method, path), ready=False)
    assert error_of(response) == (503, "not_ready")


@pytest.mark.parametrize("digits", [1, 4_400])  # Python's int() takes 4,300
def test_a_key_is_asked_for_whatever_the_path(bundle_path, digits):
    app = create_app(Settings(bundle=bundle_path, api_keys="secret"))
    response = talk_to(app, lambda client: client.get(f"/v1/features/0/{digits * '1'}"), ready=False)
    assert error_of(response) == (401, "unauthorized")


def test_a_bundle_with_a_mismatched_table_stops_the_start(bundle_path, tmp_path):
    """Rather than failing the first request that needs it, long after /readyz reported ready."""
    path = copy(bundle_path, tmp_path / "bundle")
    short_fold(path)
    with pytest.raises(BundleError, match=r"fold\.npy"):
        talk_to(create_app(Settings(bundle=path)), lambda client: client.get("/v1/model"))


def test_a_start_that_fails_leaves_no_thread_behind(bundle, settings, monkeypatch):
    async def start():
        async with Attributor(bundle, settings):
            pass

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(Engine, "warm_up", fail)
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="no memory"):
        asyncio.run(start())
    assert set(threading.enumerate()) <= before


def test_questions_about_features_delay_no_account(carded, picture, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(knowledge, "search", lambda *_: gate.wait(30))
    app = create_app(Settings(bundle=carded.path))

    async def conversation(client):
        searches = [asyncio.create_task(client.get("/v1/features")) for _ in range(20)]
        await asyncio.sleep(0.1)
        answer = await client.post("/v1/attribute", files={"image": picture()})
        still_waiting = not any(search.done() for search in searches)
        for search in searches:
            search.cancel()
        gate.set()
        return answer, still_waiting

    answer, still_waiting = talk_to(app, conversation)
    assert answer.status_code == 200
    assert still_waiting
