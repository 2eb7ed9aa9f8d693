"""KServe's V1 protocol: `:predict` and `:explain` say what `/v1/classify` and `/v1/attribute` say."""

import base64
import json
import shutil
import subprocess

import pytest

from raw_http import KEY


@pytest.fixture(scope="module")
def base(server):
    return "/v1/models/" + server.http.get("/v1/model").json()["name"]


def text(image):
    return base64.b64encode(image).decode()


WAYS = {
    "text": lambda it: it,
    "data URL": lambda it: f"data:image/png;base64,{it}",
    "TensorFlow Serving": lambda it: {"b64": it},
    "TensorFlow's flowers": lambda it: {"image_bytes": {"b64": it}, "key": "   1"},
    "KServe's custom model": lambda it: {"image": {"b64": it}},
    "TorchServe": lambda it: {"data": it},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_kserves_examples_is_read(server, base, picture, way):
    images = [picture(seed=seed) for seed in range(2)]
    asked = {"labels": ["cat", "dog"], "top_k": 1}
    expected = [server.post("/v1/classify", image, asked).json()["predictions"] for image in images]
    instances = [WAYS[way](text(image)) for image in images]
    response = server.http.post(f"{base}:predict", json={"instances": instances, "parameters": asked})
    assert response.status_code == 200, response.text
    assert list(response.json()) == ["predictions"]
    predictions = response.json()["predictions"]
    assert [one["predictions"] for one in predictions] == expected
    assert [one["key"] for one in predictions] == ["   1" if "flowers" in way else None] * 2
    assert [one["warnings"] for one in predictions] == [[], []]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("header", [["-H", "Content-Type: application/json"], []])
def test_the_curl_line_of_kserves_documentation_works(server, base, picture, tmp_path, header):
    file = tmp_path / "input.json"
    file.write_text(json.dumps({"instances": [{"image": {"b64": text(picture())}}]}))
    line = ["curl", "-sS", "-H", "Host: vitrine.default.example.com", *header]
    done = subprocess.run(
        [*line, f"http://127.0.0.1:{server.port}{base}:predict", "-d", f"@{file}"], capture_output=True, check=True
    )
    assert len(json.loads(done.stdout)["predictions"]) == 1


def test_explanations_are_accounts(server, base, picture):
    images = [picture(seed=seed) for seed in range(2)]
    asked = {"labels": ["Cat", "cat"], "explain": {"features": 1, "heatmap": True}}
    expected = [server.post("/v1/attribute", image, asked).json() for image in images]
    body = {"instances": [text(image) for image in images], "parameters": asked}
    response = server.http.post(f"{base}:explain", json=body)
    assert response.status_code == 200, response.text
    assert list(response.json()) == ["explanations"]
    for found, whole in zip(response.json()["explanations"], expected, strict=True):
        for name in ("predictions", "explanations", "fidelity", "warnings"):
            assert found[name] == whole[name]


def test_what_models_there_are_and_whether_they_are_ready(server, base):
    name = base.rpartition("/")[2]
    assert server.http.get("/v1/models").json()["models"] == [name]
    answer = server.http.get(base).json()
    assert (answer["name"], answer["ready"]) == (name, True)


GOOD = {"b64": "iVBORw0KGgo="}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "invalid_request: instances: "),
        ({"instances": []}, 400, "invalid_request: instances: "),
        ({"instances": [[5.1, 3.5]]}, 400, "invalid_request: instances.0"),
        ({"instances": [{}]}, 400, "missing_image: instances.0: "),
        ({"instances": [GOOD | {"data": "AAAA"}]}, 400, "missing_image: instances.0: "),
        ({"instances": [{"pixels": "AAAA"}]}, 400, "invalid_request: instances.0"),
        ({"instances": ["https://example.org/cat.png"]}, 400, "invalid_image: instances.0 is not base64"),
        ({"instances": ["?"]}, 400, "invalid_image: instances.0 is not base64"),
        ({"instances": [{"image": {"b64": "?"}}]}, 400, "invalid_image: instances.0.image is not base64"),
        ({"instances": ["aGVsbG8="]}, 415, "unsupported_image: instances.0: "),
        ({"instances": ["AAAA"] * 65}, 413, "batch_too_large: "),
        ({"instances": [GOOD], "parameters": {"top_k": 0}}, 400, "invalid_request: parameters.top_k: "),
        ({"instances": [GOOD], "parameters": {"explain": 1}}, 400, "invalid_request: parameters.explain"),
        ({"instances": [GOOD], "signature_name": "x"}, 400, "invalid_request: signature_name: "),
    ],
)
def test_errors_are_kserves(server, base, body, status, says):
    for verb in ("predict", "explain"):
        response = server.http.post(f"{base}:{verb}", json=body)
        assert response.status_code == status, response.text
        assert list(response.json()) == ["error"]
        assert response.json()["error"].startswith(says)


def test_one_bad_image_is_named(server, base, picture):
    response = server.http.post(f"{base}:predict", json={"instances": [text(picture()), "aGVsbG8="]})
    assert response.status_code == 415
    assert response.json()["error"].startswith("unsupported_image: instances.1: ")


def test_another_model_is_not_found(server, picture):
    for verb in ("predict", "explain"):
        response = server.http.post(f"/v1/models/resnet:{verb}", json={"instances": [text(picture())]})
        assert response.status_code == 404
        assert response.json()["error"].startswith("model_not_found: there is no model named 'resnet'")


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize(
    "path", ["/v1/models/a:predict", "/v1/models/a:explain", "/v2/models/a/infer", "/v2/models/a/b/infer"]
)
def test_another_method_is_not_allowed(server, method, path):
    response = server.http.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"].startswith("method_not_allowed: ")


def test_a_key_is_asked_for(door, picture):
    body = {"instances": [text(picture())]}
    response = door.http.post("/v1/models/demo:predict", json=body)
    assert response.status_code == 401
    assert response.json()["error"].startswith("unauthorized: ")
    response = door.http.post("/v1/models/demo:predict", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == 200
