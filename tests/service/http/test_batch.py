"""/v1/attribute:batch: every image is answered as if it had come alone, and one that fails, fails alone."""

import base64
import json

import pytest

from vitrine.service.operations.settings import Settings

PATH = "/v1/attribute:batch"


def post(server, images, request=None, **headers):
    files = [("image", (f"{number}.png", image)) for number, image in enumerate(images)]
    if request is not None:
        files.append(("request", (None, json.dumps(request))))
    return server.http.post(PATH, files=files, headers=headers)


def numbers(answer):
    """All numbers of an answer, in order, except the timings."""
    if isinstance(answer, dict):
        return [number for key, value in answer.items() if key != "timings_ms" for number in numbers(value)]
    if isinstance(answer, list):
        return [number for value in answer for number in numbers(value)]
    return [answer] if isinstance(answer, float | int) else []


@pytest.mark.parametrize(
    "request_part",
    [None, {"labels": ["a", "b"], "top_k": 1, "explain": {"heatmap": True, "lens": True, "targets": ["b"]}}],
)
def test_each_image_is_answered_as_if_it_had_come_alone(server, picture, request_part):
    images = [picture(seed=seed) for seed in range(5)]
    response = post(server, images, request_part)
    assert response.status_code == 200
    results = response.json()["results"]
    assert [result["status"] for result in results] == [200] * 5
    for image, result in zip(images, results, strict=True):
        alone = server.attribute(image, **(request_part or {}))
        assert result["error"] is None
        assert set(result["answer"]) == set(alone) - {"request_id", "model"}
        together = result["answer"]
        alone = {key: alone[key] for key in together}
        assert numbers(together) == pytest.approx(numbers(alone), abs=1e-4)
        assert [p["label"] for p in together["predictions"]] == [p["label"] for p in alone["predictions"]]


def test_one_that_fails_fails_alone(server, picture):
    huge = picture("PNG", "L", (20_000, 1))
    response = post(server, [picture(), b"no image", b"", huge, picture()[:100], picture(seed=1)])
    assert response.status_code == 200
    results = response.json()["results"]
    assert [result["status"] for result in results] == [200, 415, 400, 413, 400, 200]
    codes = [result["error"] and result["error"]["code"] for result in results]
    assert codes == [None, "unsupported_image", "invalid_image", "image_too_large", "invalid_image", None]
    assert all((result["answer"] is None) == (result["error"] is not None) for result in results)


def test_json_says_the_same(server, picture):
    images = [picture(seed=seed) for seed in range(3)]
    texts = [base64.b64encode(image).decode() for image in images] + ["?!", "AAAA"]
    response = server.post_text(json.dumps({"images_base64": texts, "labels": ["a", "b"]}), PATH)
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert [result["status"] for result in results] == [200, 200, 200, 400, 415]
    assert "images_base64[3]" in results[3]["error"]["message"]
    multipart = post(server, images, {"labels": ["a", "b"]}).json()["results"]
    assert numbers(results[:3]) == pytest.approx(numbers(multipart), abs=1e-4)


def test_what_concerns_all_is_one_refusal(server, picture, refused):
    refused(post(server, [picture()] * 2, {"labels": []}), 400, "invalid_request")
    refused(post(server, [picture()] * 2, {"explain": {"targets": ["nobody"]}}), 400, "invalid_request")
    refused(server.http.post(PATH, files={"request": (None, "{}")}), 400, "missing_image")
    refused(server.http.post(PATH, data={"image": "text"}), 415, "unsupported_media_type")
    refused(server.post_text("{}", PATH), 400, "missing_image")
    refused(server.post_text('{"images_base64": []}', PATH), 400, "invalid_request")


@pytest.mark.parametrize("more", [1, 2, 30])
def test_more_images_than_allowed_are_refused(server, picture, refused, more):
    limit = Settings.model_fields["max_batch"].default
    refused(post(server, [b"x"] * (limit + more)), 413, "batch_too_large")
    body = json.dumps({"images_base64": ["AAAA"] * (limit + more)})
    refused(server.post_text(body, PATH), 413, "batch_too_large")


def test_a_batch_of_the_largest_size_is_answered(server, picture):
    limit = Settings.model_fields["max_batch"].default
    response = post(server, [picture(size=(32, 32), seed=seed) for seed in range(limit)])
    assert [result["status"] for result in response.json()["results"]] == [200] * limit
