"""`/v1/embeddings` and `/v1/models`, by OpenAI's own client and by hand."""

import base64

import numpy as np
import openai
import pytest
from tokenizers import Tokenizer

from raw_http import KEY, MIB, metric
from vitrine.service.errors import ServiceError, queue_full
from vitrine.service.http.protocols.openai import error_shape

TEXTS = ["a photo of a cat", "ship, at sea"]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def name(server):
    return server.http.get("/v1/model").json()["name"]


def data_url(image):
    return "data:image/png;base64," + base64.b64encode(image).decode()


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"user": "me"}])
def test_texts_and_images_in_any_order_are_embedded(server, client, name, picture, options):
    images = [picture(seed=seed) for seed in range(2)]
    inputs = [TEXTS[0], data_url(images[0]), TEXTS[1], data_url(images[1])]
    answer = client.embeddings.create(model=name, input=inputs, **options)
    ours = [server.post("/v1/embed", image, {"texts": TEXTS}).json() for image in images]
    expected = [
        ours[0]["text_embeddings"][0],
        ours[0]["embedding"],
        ours[0]["text_embeddings"][1],
        ours[1]["embedding"],
    ]
    assert [item.index for item in answer.data] == [0, 1, 2, 3]
    assert answer.model == name
    for item, vector in zip(answer.data, expected, strict=True):
        found = item.embedding
        if options.get("encoding_format") == "base64":  # asked for by name, the client leaves it as it is
            found = np.frombuffer(base64.b64decode(found), "<f4")
        np.testing.assert_allclose(found, vector, atol=1e-5)


def test_one_text_is_no_list(client, name):
    (item,) = client.embeddings.create(model=name, input=TEXTS[0]).data
    assert np.linalg.norm(item.embedding) == pytest.approx(1, abs=1e-5)


def test_tokens_are_counted_as_the_clip_reads_them(client, name, bundle):
    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    tokenizer.no_padding()
    texts = ["very " * 50 + "long", "a cat"]
    usage = client.embeddings.create(model=name, input=texts).usage
    assert usage.prompt_tokens == usage.total_tokens == sum(len(tokenizer.encode(text).ids) for text in texts)


def test_images_alone_have_no_tokens(client, name, picture):
    assert client.embeddings.create(model=name, input=data_url(picture())).usage.total_tokens == 0


def test_warnings_and_edit_come_along(server, name):
    answer = server.http.post("/v1/embeddings", json={"model": name, "input": ["Cat", "cat"]}).json()
    assert set(answer) == {"object", "data", "model", "usage", "edit", "warnings"}
    assert [warning["code"] for warning in answer["warnings"]] == ["labels_same"]
    assert answer["edit"] is None


def test_models_are_the_one_in_service(client, name):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (name, "model", "vitrine")
    assert client.models.retrieve(name) == model
    with pytest.raises(openai.NotFoundError) as refusal:
        client.models.retrieve("text-embedding-3-small")
    assert refusal.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "clip"}, 404, "model_not_found", "model"),
        ({"input": ""}, 400, "invalid_request", "input.constrained-str"),
        ({"input": []}, 400, "invalid_request", None),
        ({"input": [[1, 2]]}, 400, "invalid_request", "input"),
        ({"input": [1, 2]}, 400, "invalid_request", "input"),
        ({"input": {"image": "x"}}, 400, "invalid_request", None),
        ({"input": ["a", "https://example.org/cat.png"]}, 400, "invalid_request", "input.1"),
        ({"input": ["a", "data:image/png;base64,?"]}, 400, "invalid_image", "input.1"),
        ({"input": ["a", "data:image/png,abc"]}, 400, "invalid_image", "input.1"),
        ({"input": ["a", "data:;base64,aGVsbG8="]}, 415, "unsupported_image", "input.1"),
        ({"input": ["a"] * 3_000}, 400, "invalid_request", None),
        ({"input": ["data:image/png;base64,AAAA"] * 65}, 413, "batch_too_large", None),
        ({"dimensions": 8}, 400, "invalid_request", "dimensions"),
        ({"encoding_format": "int8"}, 400, "invalid_request", "encoding_format"),
        ({"labels": ["a"]}, 400, "invalid_request", "labels"),
        ({"strict": True, "input": ["Cat", "cat"]}, 400, "invalid_request", "texts"),
        ({"edit": "nothing"}, 400, "unknown_edit", None),
    ],
)
def test_errors_are_openais(server, name, fields, status, code, param):
    response = server.http.post("/v1/embeddings", json={"model": name, "input": "a"} | fields)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert param is None or error["param"].startswith(param.partition(".constr")[0])
    assert error["message"]
    assert response.headers["x-request-id"]


def test_a_text_that_begins_like_a_data_url_is_a_text(client, name):
    (item,) = client.embeddings.create(model=name, input=["data: the new oil"]).data
    assert item.embedding


def test_the_embeddings_size_may_be_said(client, name):
    size = len(client.embeddings.create(model=name, input="a").data[0].embedding)
    assert client.embeddings.create(model=name, input="a", dimensions=size).data


@pytest.mark.parametrize(
    ("content_type", "status"), [("text/plain", 415), ("image/png", 415), ("application/json", 400)]
)
def test_other_bodies_are_refused(server, content_type, status):
    response = server.http.post("/v1/embeddings", content=b"x", headers={"content-type": content_type})
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_keys_and_limits_are_those_of_the_service(door, picture):
    base = f"http://127.0.0.1:{door.port}/v1"
    with openai.OpenAI(base_url=base, api_key=KEY, max_retries=0) as client:
        name = client.models.list().data[0].id
        assert client.embeddings.create(model=name, input=[data_url(picture())]).data
        with pytest.raises(openai.APIStatusError) as refusal:  # by the middleware, before any route
            client.embeddings.create(model=name, input="x" * 9 * MIB)
        assert (refusal.value.status_code, refusal.value.code) == (413, "body_too_large")
    with openai.OpenAI(base_url=base, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refusal:
            client.embeddings.create(model=name, input="a")
        assert refusal.value.type == "authentication_error"


def test_overload_and_failures_have_types_of_their_own():
    assert error_shape(queue_full())["error"]["type"] == "rate_limit_error"
    assert error_shape(ServiceError("internal", "x"))["error"]["type"] == "server_error"


def test_requests_count_as_all_others(server, name):
    series = 'vitrine_requests_total{endpoint="/v1/embeddings",status="200"}'
    before = metric(server, series)
    server.http.post("/v1/embeddings", json={"model": name, "input": "a"})
    assert metric(server, series) == before + 1
