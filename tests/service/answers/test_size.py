"""Large answers: bounded by what is asked for, and the same JSON when made piece by piece."""

import json

import pytest

from vitrine.service.answers.answer_size import attribution_values
from vitrine.service.answers.serialise import json_text
from vitrine.service.schemas.attribute import AttributeRequest, AttributeResponse, Attribution
from vitrine.service.schemas.batch import BatchItem, BatchResponse
from vitrine.service.schemas.embed import EmbedResponse

EVERYTHING = {"heatmap": True, "lens": True, "matrix": True, "features": 1000}
ATTENTION = {"attention": {"layer": 2, "head": 0, "features": 100, "pairs": 1000}}
LABELS = [f"label {number}" for number in range(32)]


def count(value):
    """Numbers and texts of a JSON value."""
    if isinstance(value, dict):
        return sum(map(count, value.values()))
    return sum(map(count, value)) if isinstance(value, list) else 1


@pytest.mark.parametrize(
    ("explain", "top_k"),
    [({}, 5), ({"features": 0}, 1), ({"targets": LABELS, **EVERYTHING}, 100), (EVERYTHING, 5), (ATTENTION, 5)],
)
def test_the_size_is_known_beforehand(server, bundle, picture, explain, top_k):
    fields = {"labels": LABELS, "top_k": top_k, "explain": explain}
    expected = attribution_values(bundle.manifest, AttributeRequest.model_validate(fields), len(LABELS))
    actual = count(server.attribute(picture(), **fields))
    assert actual <= expected * 1.1 + 30
    assert expected <= 2 * actual + 30


def test_an_answer_that_would_be_too_large_is_refused(start_server, bundle, picture, refused):
    everything = {"labels": LABELS, "explain": EVERYTHING | {"targets": LABELS}}
    with start_server(VITRINE_BUNDLE=bundle.path, VITRINE_MAX_ANSWER_VALUES=12_000) as server:
        assert server.post("/v1/attribute", picture(), everything).status_code == 200
        images = [("image", ("a", picture(seed=seed))) for seed in range(2)]
        request = ("request", (None, json.dumps(everything)))
        response = server.http.post("/v1/attribute:batch", files=[*images, request])
        refused(response, 413, "answer_too_large")
        assert "12,000" in response.json()["error"]["message"]
        response = server.http.post("/v1/embed", json={"texts": [str(number) for number in range(501)]})
        refused(response, 413, "answer_too_large")
        assert server.http.post("/v1/embed", json={"texts": ["a", "b"]}).status_code == 200


def test_the_json_is_the_same_in_pieces(server, picture):
    response = server.post(
        "/v1/attribute", picture(), {"labels": LABELS, "explain": EVERYTHING | ATTENTION | {"targets": LABELS}}
    )
    answer = AttributeResponse.model_validate(response.json())
    answer.explanations[0].logit = float("nan")
    item = BatchItem(status=200, answer=Attribution.model_validate(response.json()), error=None)
    embeddings = EmbedResponse(
        request_id="ä", model=answer.model, embedding=None, text_embeddings=[[0.1], [2e-30]], timings_ms={}
    )
    for whole in (answer, item, embeddings, BatchResponse(request_id="", model=answer.model, results=[])):
        assert json_text(whole) == whole.model_dump_json().encode()
