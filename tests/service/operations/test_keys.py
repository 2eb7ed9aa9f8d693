"""API keys: who has access, and that nothing of an unauthorised request is read."""

import asyncio

import httpx
import pytest
from pydantic import SecretStr

from vitrine.service.http.application import create_app
from vitrine.service.operations.keys import Keys
from vitrine.service.operations.settings import Settings, SettingsError


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# of the web shop\nfirst\n\n  second  \n")
    return path


def test_every_given_key_opens_and_no_other(key_file):
    keys = Keys("api_keys", SecretStr("third, fourth"), key_file)
    for key in ("first", "second", "third", "fourth"):
        assert keys.accept(f"Bearer {key}")
        assert keys.accept(f"bearer  {key} ")
    for header in ("", "Bearer", "Bearer ", "first", "Basic first", "Bearer fir", "Bearer firstfirst", "Bearer FIRST"):
        assert not keys.accept(header)
    assert not keys.accept("Bearer # of the web shop")
    assert not keys.accept("Bearer \udcff")


@pytest.mark.parametrize("key", ["schlüssel", "à", "ключ", "鍵"])
def test_keys_beyond_ascii_are_compared_as_bytes(tmp_path, key):
    """Sent as UTF-8, as programs do, and, where that can be, as Latin-1, as browsers do. The last byte of à is no space
    to be stripped, though Latin-1 has one there."""
    file = tmp_path / "keys"
    file.write_text(f"{key}\n", "utf-8-sig")
    for keys in (Keys("api_keys", SecretStr(key), None), Keys("api_keys", None, file)):
        assert keys.accept(f"Bearer {key}".encode().decode("latin-1"))
        assert not keys.accept(f"Bearer {key[:-1]}".encode().decode("latin-1"))
        if key.encode("latin-1", "ignore"):
            assert keys.accept(f"Bearer {key}")


def test_a_key_beyond_ascii_opens_a_route(bundle_path):
    async def conversation(client, app):
        answers = [await client.get("/v1/model", headers={b"Authorization": b"Bearer " + key}) for key in keys]
        assert [answer.status_code for answer in answers] == [200, 200, 401]

    keys = ("schlüssel".encode(), "schlüssel".encode("latin-1"), b"schlussel")
    talk(Settings(bundle=bundle_path, api_keys=SecretStr("schlüssel")), conversation)


def test_without_keys_none_is_required():
    assert not Keys("api_keys", None, None)


@pytest.mark.parametrize("content", [None, "", "# nobody yet\n", b"\xff\xfe"])
def test_a_file_that_names_no_key_does_not_open_the_service(tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError, match="VITRINE_API_KEYS_FILE"):
        create_app(Settings(api_keys_file=path))


def talk(settings, conversation):
    async def run():
        app = create_app(settings)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        async with app.router.lifespan_context(app), client:
            return await conversation(client, app)

    return asyncio.run(run())


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_keys_guard_v1_and_not_the_probes(bundle_path, key_file, picture):
    async def conversation(client, app):
        files = {"image": picture()}
        guarded = [("POST", path) for path in ("attribute", "attribute:batch", "classify", "embed")]
        for method, path in [*guarded, ("GET", "model"), ("GET", "labels")]:
            for headers in ({}, bearer("wrong"), {"Authorization": "Basic Zmlyc3Q="}):
                response = await client.request(method, f"/v1/{path}", headers=headers)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "unauthorized"
            sent = {"files": files} if method == "POST" else {}
            allowed = await client.request(method, f"/v1/{path}", headers=bearer("second"), **sent)
            assert allowed.status_code == 200, allowed.text
        for path in ("/metrics", "/openapi.json", "/docs"):
            assert (await client.get(path)).status_code == 200
        assert (await client.post("/admin/reload", headers=bearer("first"))).status_code == 404

    talk(Settings(bundle=bundle_path, api_keys_file=key_file), conversation)


def test_a_body_without_a_key_is_not_read(bundle_path):
    async def conversation(client, app):
        async def unread():
            raise AssertionError("read")
            yield b""

        response = await client.post("/v1/attribute", content=unread(), headers={"content-type": "application/json"})
        assert response.status_code == 401

    talk(Settings(bundle=bundle_path, api_keys=SecretStr("k")), conversation)


def test_keys_are_read_again_by_a_reload_and_a_file_without_any_is_refused(bundle_path, key_file):
    async def conversation(client, app):
        async def status(key):
            return (await client.get("/v1/model", headers=bearer(key))).status_code

        key_file.write_text("new\n")
        assert [await status("first"), await status("new")] == [200, 401]
        assert (await client.post("/admin/reload", headers=bearer("first"))).status_code == 401
        assert (await client.post("/admin/reload", headers=bearer("admin"))).status_code == 200
        assert [await status("first"), await status("new")] == [401, 200]
        key_file.write_text("")
        refused = await client.post("/admin/reload", headers=bearer("admin"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "bundle_refused")
        assert await status("new") == 200

    talk(Settings(bundle=bundle_path, api_keys_file=key_file, admin_keys=SecretStr("admin")), conversation)
