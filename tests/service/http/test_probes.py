"""Probes, metrics, the OpenAPI document and request ids, through a real server process."""

import json
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

LABELS = ["red circle", "green square", "blue triangle"]  # the tiny bundle's


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes(server, path):
    assert server.http.get(path).status_code == 200


def test_a_service_that_cannot_decode_is_not_ready(run_python):
    program = (
        "from types import SimpleNamespace as Fake; from vitrine.service import app\n"
        "for attributor in (None, Fake(can_decode=lambda: False), Fake(can_decode=lambda: True)):\n"
        "    app.app.state.serving = Fake(attributor=attributor)\n"
        "    print(app.Vitrine.inner.__is_ready__(None))"
    )
    assert run_python("-c", program).stdout.split() == ["False", "False", "True"]


def metrics(server):
    """(name, labels) -> value of every sample at /metrics."""
    response = server.http.get("/metrics")
    assert response.status_code == 200
    families = text_string_to_metric_families(response.text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_requests_stages_and_fidelity(server, picture, carded):
    def value(series, **labels):
        return metrics(server).get((series, frozenset(labels.items())), 0)

    answered = value("vitrine_requests_total", endpoint="/v1/attribute", status="200")
    refused = value("vitrine_requests_total", endpoint="/v1/attribute", status="415")
    server.attribute(picture())
    server.post("/v1/attribute", b"no image")
    assert value("vitrine_requests_total", endpoint="/v1/attribute", status="200") == answered + 1
    assert value("vitrine_requests_total", endpoint="/v1/attribute", status="415") == refused + 1
    assert value("vitrine_request_seconds_count", endpoint="/v1/attribute") >= answered + refused + 2
    for stage in ("decode", "labels", "queue", "inference", "ledger"):
        assert value("vitrine_stage_seconds_count", stage=stage) >= 1
    assert value("vitrine_fidelity_r2_count") >= answered + 1
    assert value("vitrine_error_share_count") >= answered + 1
    info = {"name": carded.manifest.name, "digest": carded.digest, "provider": "CPUExecutionProvider"}
    assert value("vitrine_bundle_info", **info) == 1


def test_junk_paths_and_methods_make_no_time_series(server):
    server.http.get("/junk/warm-up")
    before = set(metrics(server))
    for index in range(3):
        server.http.get(f"/junk/{index}")
        server.http.post(f"/v1/attribute/{index}")
        server.http.request("OPTIONS", f"/livez/{index}")
    new = {(name, tuple(labels)) for name, labels in set(metrics(server)) - before}
    assert not [series for series in new if re.search(r"/\d", str(series))]


@pytest.fixture(scope="module")
def openapi(server):
    response = server.http.get("/openapi.json")
    assert response.status_code == 200
    return response.json()


def test_openapi_is_a_sound_document_of_every_route(openapi):
    assert openapi["openapi"].startswith("3.")
    assert openapi["info"]["title"] == "Vitrine"
    assert openapi["info"]["version"]
    assert {path: set(item) for path, item in openapi["paths"].items()} == {
        "/v1/attribute": {"post"},
        "/v1/attribute:batch": {"post"},
        "/v1/classify": {"post"},
        "/v1/embed": {"post"},
        "/v1/features": {"get"},
        "/v1/features/{layer}/{index}": {"get"},
        "/v1/labels": {"get"},
        "/v1/model": {"get"},
        "/v1/circuit": {"post"},
        "/v1/intervene": {"post"},
        "/v1/similar": {"post"},
        "/v1/embeddings": {"post"},
        "/v1/models": {"get"},
        "/v1/models/{name}": {"get"},
        "/v1/models/{name}:predict": {"post"},
        "/v1/models/{name}:explain": {"post"},
        "/v2": {"get"},
        "/v2/health/live": {"get"},
        "/v2/health/ready": {"get"},
        "/v2/models/{name}": {"get"},
        "/v2/models/{name}/ready": {"get"},
        "/v2/models/{name}/infer": {"post"},
        "/v2/models/{name}/versions/{version}": {"get"},
        "/v2/models/{name}/versions/{version}/ready": {"get"},
        "/v2/models/{name}/versions/{version}/infer": {"post"},
    }
    operations = [operation for item in openapi["paths"].values() for operation in item.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for operation in operations:
        assert all(response["description"] for response in operation["responses"].values())
        assert operation["responses"]["200"]["content"]["application/json"]["schema"]
        names = operation["operationId"].split("_v")[0].replace("_", " ")
        assert operation["summary"].lower() != names  # words of ours, not the function's name


def test_openapi_references_exist(openapi):
    schemas = openapi["components"]["schemas"]
    references = re.findall(r'"\$ref": "([^"]*)"', json.dumps(openapi))
    assert references
    assert all(reference.removeprefix("#/components/schemas/") in schemas for reference in references)


@pytest.mark.parametrize(("path", "has_explain"), [("/v1/attribute", True), ("/v1/classify", False)])
def test_openapi_describes_both_kinds_of_request(openapi, path, has_explain):
    body = openapi["paths"][path]["post"]["requestBody"]
    assert body["required"]
    fields = {"labels", "label_set", "templates", "top_k", "strict", "edit", "scoring", "threshold"} | (
        {"explain"} if has_explain else set()
    )
    multipart = body["content"]["multipart/form-data"]["schema"]
    assert multipart["required"] == ["image"]
    assert set(multipart["properties"]["request"]["properties"]) == fields
    plain = body["content"]["application/json"]["schema"]
    assert set(plain["properties"]) == fields | {"image_base64"}
    assert plain["required"] == ["image_base64"]


def test_openapi_describes_the_answer_that_is_given(server, picture, openapi):
    schemas = openapi["components"]["schemas"]

    def check(value, schema):
        schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        if schema.get("type") == "object" and "properties" in schema:
            assert set(value) == set(schema["properties"])
            for key, part in schema["properties"].items():
                check(value[key], part)
        elif schema.get("type") == "array":
            for element in value:
                check(element, schema["items"])

    request = {"explain": {"targets": LABELS}}
    for path in ("/v1/attribute", "/v1/classify"):
        responses = openapi["paths"][path]["post"]["responses"]
        answer = server.post(path, picture(), request if path == "/v1/attribute" else None).json()
        check(answer, responses["200"]["content"]["application/json"]["schema"])
        refusal = server.post(path, b"no image")
        check(refusal.json(), responses[str(refusal.status_code)]["content"]["application/json"]["schema"])


def test_the_docs_page_needs_no_other_host(server):
    page = server.http.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert "//" not in page.text
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert len(addresses) == 3
    for file in addresses:
        response = server.http.get(f"/{file}")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(("text/css", "text/javascript"))
    assert "<script>" not in page.text  # the policy would not let it run


def test_a_missing_file_is_reported_in_the_envelope(server, refused):
    refused(server.http.get("/docs/nothing.js"), 404, "not_found")
    refused(server.http.get("/docs/../app.py"), 404, "not_found")
    refused(server.http.post("/docs"), 405, "method_not_allowed")


# Request ids


@pytest.mark.parametrize("request_id", ["abc-123", "A.b_c:d-9", "x" * 128])
def test_request_id_is_adopted(server, picture, request_id):
    response = server.post("/v1/attribute", picture(), **{"X-Request-ID": request_id})
    assert response.headers["x-request-id"] == response.json()["request_id"] == request_id


@pytest.mark.parametrize("request_id", [None, "", "a b", "x" * 129, "a\tb", "ü", '"><script>'])
def test_missing_or_invalid_request_id_is_replaced(server, picture, request_id):
    headers = {} if request_id is None else {"X-Request-ID": request_id.encode()}
    response = server.post("/v1/attribute", picture(), **headers)
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    assert response.json()["request_id"] == response.headers["x-request-id"]


def test_request_ids_differ(server, picture):
    assert server.attribute(picture())["request_id"] != server.attribute(picture())["request_id"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/model"), ("GET", "/v1/attribute"), ("POST", "/v1/attribute"), ("GET", "/nowhere")]
)
def test_request_id_is_echoed_whatever_the_answer(server, method, path):
    response = server.http.request(method, path, headers={"X-Request-ID": "mine"})
    assert response.headers.get_list("x-request-id") == ["mine"]
    if response.is_error:
        assert response.json()["error"]["request_id"] == "mine"
