"""Pages of named origins may ask, and read refusals; those of others may not."""

import pytest

from raw_http import KEY
from vitrine.service.operations.settings import SettingsError, load_settings

ORIGINS = ["https://app.example", "http://localhost:8080"]  # of the server `door`


def preflight(server, origin, method="POST", headers="authorization, content-type, x-stainless-os"):
    asked = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    return server.http.options("/v1/classify", headers=asked)


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_named_origin_may_ask(door, origin):
    response = preflight(door, origin)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origin
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "authorization" in response.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in response.headers
    headers = {"Origin": origin, "Authorization": f"Bearer {KEY}"}
    for answer in (
        door.http.get("/v1/labels", headers=headers),
        door.http.get("/v1/labels", headers={"Origin": origin}),
    ):
        assert answer.status_code in (200, 401)
        assert answer.headers["access-control-allow-origin"] == origin
        assert "Origin" in answer.headers["vary"]
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
    too_large = {"Origin": origin, "Content-Type": "application/json"}
    refusal = door.http.post("/v1/classify", content=b" " * (9 * 2**20), headers=too_large)
    assert refusal.status_code == 413
    assert refusal.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("origin", ["https://other.example", "http://app.example", "https://app.example:444", "null"])
def test_another_origin_may_not(door, origin):
    response = preflight(door, origin)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_request"
    assert "VITRINE_CORS_ORIGINS" in response.json()["error"]["message"]
    assert "access-control-allow-origin" not in response.headers
    answer = door.http.get("/v1/labels", headers={"Origin": origin, "Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_other_methods_may_not(door):
    assert preflight(door, ORIGINS[0], "DELETE").status_code == 400


def test_without_the_setting_nobody_may(server, refused):
    refused(preflight(server, ORIGINS[0]), 405, "method_not_allowed")
    assert "access-control-allow-origin" not in server.http.get("/v1/labels", headers={"Origin": ORIGINS[0]}).headers


@pytest.mark.parametrize(
    "value",
    ["*", "app.example", "https://app.example/", "https://app.example/x", "https://APP.example", "null", "https://a b"],
)
def test_what_is_no_origin_stops_the_start(monkeypatch, value):
    monkeypatch.setenv("VITRINE_CORS_ORIGINS", f"https://good.example, {value}")
    with pytest.raises(SettingsError, match=r"VITRINE_CORS_ORIGINS.*is not an origin"):
        load_settings()


def test_origins_are_read_as_they_are_sent(monkeypatch):
    monkeypatch.setenv("VITRINE_CORS_ORIGINS", " https://a.example,http://[::1]:8080 ,chrome-extension://abcdef, ")
    assert load_settings().origins == ("https://a.example", "http://[::1]:8080", "chrome-extension://abcdef")
    monkeypatch.setenv("VITRINE_CORS_ORIGINS", "")
    assert load_settings().origins == ()
