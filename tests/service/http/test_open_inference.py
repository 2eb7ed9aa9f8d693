"""The Open Inference Protocol, by Triton's own client and by hand."""

import base64
import json
import struct

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tritonclient.utils import InferenceServerException

from raw_http import KEY
from vitrine.service.errors import ServiceError
from vitrine.service.http.protocols.tensors import parse_infer

OUTPUTS = ["label", "probability", "logit", "cosine", "embedding"]


@pytest.fixture(scope="module")
def client(server):
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    yield client
    client.close()


@pytest.fixture(scope="module")
def name(server):
    return server.http.get("/v1/model").json()["name"]


def tensor(name, elements, shape=None, **options):
    found = triton.InferInput(name, shape or [len(elements)], "BYTES")
    found.set_data_from_numpy(np.array(elements, object).reshape(shape or -1), **options)
    return found


def test_warnings_are_notes_of_each_image(client, name, picture, encode):
    transparent = encode(Image.new("RGBA", (50, 40)), "PNG")
    inputs = [tensor("image", [picture(), transparent]), tensor("labels", ["Cat", "cat"])]
    notes = json.loads(client.infer(name, inputs).get_response()["parameters"]["notes"])
    codes = [[warning["code"] for warning in note["warnings"]] for note in notes]
    assert codes == [["labels_same"], ["labels_same", "image_transparent"]]


def image_input(**fields):
    return {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aGVsbG8="]} | fields


def test_health_and_metadata(client, server, name, bundle):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(name)
    assert not client.is_model_ready("resnet")
    assert server.http.get("/v2/health/live").json() == {"live": True}
    assert server.http.get("/v2/health/ready").json() == {"ready": True}
    metadata = client.get_server_metadata()
    assert metadata["name"] == "vitrine"
    assert "binary_tensor_data" in metadata["extensions"]
    model = client.get_model_metadata(name)
    (version,) = model["versions"]
    assert client.is_model_ready(name, version)
    assert not client.is_model_ready(name, "2")
    assert [it["name"] for it in model["inputs"]] == ["image", "labels", "templates"]
    assert [it["name"] for it in model["outputs"]] == OUTPUTS
    assert model["outputs"][-1]["shape"] == [-1, bundle.manifest.shape.embedding]


@pytest.mark.parametrize("as_bytes", [True, False])
@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("column", [True, False])
def test_tensors_say_what_classify_says(client, server, name, picture, as_bytes, coding, column):
    images = [picture(seed=seed) for seed in range(3)]
    labels = ["cat", "Hund", "ねこ", "dog"]
    sent = images if as_bytes else [base64.b64encode(image).decode() for image in images]
    inputs = [
        tensor("image", sent, [3, 1] if column else None, binary_data=as_bytes),
        tensor("labels", labels, binary_data=as_bytes),
        tensor("templates", ["a photo of a {}"], binary_data=as_bytes),
    ]
    outputs = [triton.InferRequestedOutput(output, binary_data=as_bytes) for output in OUTPUTS]
    result = client.infer(
        name,
        inputs,
        outputs=outputs,
        request_id="mine",
        parameters={"top_k": 2},
        request_compression_algorithm=coding,
        response_compression_algorithm=coding and "gzip",
    )
    assert result.get_response()["id"] == "mine"
    assert result.get_response()["model_name"] == name
    asked = {"labels": labels, "templates": ["a photo of a {}"], "top_k": 2}
    for row, image in enumerate(images):
        expected = server.post("/v1/classify", image, asked).json()["predictions"]
        texts = [it.decode() if isinstance(it, bytes) else it for it in result.as_numpy("label")[row]]
        assert texts == [prediction["label"] for prediction in expected]
        for output in OUTPUTS[1:4]:
            numbers = [prediction[output] for prediction in expected]
            np.testing.assert_allclose(result.as_numpy(output)[row], numbers, atol=1e-4)
        embedding = server.post("/v1/embed", image).json()["embedding"]
        np.testing.assert_allclose(result.as_numpy("embedding")[row], embedding, atol=1e-5)


def test_outputs_by_default(client, server, name, picture):
    result = client.infer(name, [tensor("image", [picture()])])  # the client asks for bytes then
    assert [it["name"] for it in result.get_response()["outputs"]] == OUTPUTS[:4]
    assert result.as_numpy("probability").sum() == pytest.approx(1, abs=1e-5)
    body = {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(picture()).decode()]}]
    }
    for version in ("", "/versions/" + client.get_model_metadata(name)["versions"][0]):
        answer = server.http.post(f"/v2/models/{name}{version}/infer", json=body)
        assert answer.headers["content-type"] == "application/json"
        assert "inference-header-content-length" not in answer.headers
        assert set(answer.json()) == {"model_name", "model_version", "parameters", "outputs"}
        for output in answer.json()["outputs"]:
            assert output["shape"] == [1, 3]
            assert len(output["data"]) == 3
            assert (
                output["data"] == pytest.approx(result.as_numpy(output["name"])[0].tolist(), abs=1e-5)
                or output["name"] == "label"
            )


def test_options_of_classify_are_parameters(client, name, picture):
    parameters = {"label_set": "pets", "scoring": "independent", "threshold": -1.0}
    result = client.infer(name, [tensor("image", [picture()])], parameters=parameters)
    assert result.as_numpy("label").shape == (1, 2)
    (note,) = json.loads(result.get_response()["parameters"]["notes"])
    assert note["edit"] is None
    assert sorted(note["verdict"]["above"]) == ["cat", "dog"]
    assert (result.as_numpy("probability") > 0.5).all()


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "invalid_request: inputs: "),
        ({"inputs": []}, 400, "invalid_request: inputs: "),
        ({"inputs": [image_input()]}, 415, "unsupported_image: image[0]: "),
        ({"inputs": [image_input(data=["?"])]}, 400, "invalid_image: image[0] is not base64"),
        ({"inputs": [image_input(data=["https://example.org/a.png"])]}, 400, "invalid_image: image[0] is not base64"),
        ({"inputs": [image_input(data=[])]}, 400, "invalid_request: the input 'image' has 0 elements"),
        ({"inputs": [image_input(data=[], shape=[0])]}, 400, "missing_image: "),
        ({"inputs": [image_input(data=[1])]}, 400, "invalid_request: the data of 'image' must only have texts"),
        ({"inputs": [image_input(data=None)]}, 400, "invalid_request: the input 'image' has neither"),
        ({"inputs": [image_input(shape=[2])]}, 400, "invalid_request: the input 'image' has 1 elements"),
        ({"inputs": [image_input(shape=[1, 2])]}, 400, "invalid_request: the input 'image' has 1 elements"),
        ({"inputs": [image_input(shape=[-1])]}, 400, "invalid_request: the input 'image' has 1 elements"),
        ({"inputs": [image_input(datatype="FP32")]}, 400, "invalid_request: inputs.0.datatype: "),
        ({"inputs": [image_input(name="pixels")]}, 400, "invalid_request: inputs.0.name: "),
        ({"inputs": [image_input(), image_input()]}, 400, "invalid_request: the input 'image' is sent more than once"),
        ({"inputs": [image_input(name="labels")]}, 400, "missing_image: "),
        ({"inputs": [image_input(data=["AAAA"] * 65, shape=[65])]}, 413, "batch_too_large: "),
        (
            {"inputs": [image_input(parameters={"shared_memory_region": "x"})]},
            400,
            "invalid_request: the input 'image' has a",
        ),
        (
            {"inputs": [image_input(data=None, parameters={"binary_data_size": 1})]},
            400,
            "invalid_request: binary_data_size 1",
        ),
        (
            {"inputs": [image_input(parameters={"binary_data_size": 0})]},
            400,
            "invalid_request: the input 'image' has both `data` and",
        ),
        ({"inputs": [image_input()], "outputs": []}, 400, "invalid_request: outputs: "),
        ({"inputs": [image_input()], "outputs": [{"name": "x"}]}, 400, "invalid_request: outputs.0.name: "),
        ({"inputs": [image_input()], "parameters": {"top_k": 0}}, 400, "invalid_request: top_k: "),
        ({"inputs": [image_input()], "parameters": {"priority": 1}}, 400, "invalid_request: priority: "),
        (
            {"inputs": [image_input()], "parameters": {"binary_data_output": 1}},
            400,
            "invalid_request: the parameter 'binary",
        ),
        (
            {"inputs": [image_input()], "outputs": [{"name": "label", "parameters": {"classification": 3}}]},
            400,
            "invalid_request: the output 'label' has an unknown parameter",
        ),
    ],
)
def test_errors_are_the_protocols(server, name, body, status, says):
    response = server.http.post(f"/v2/models/{name}/infer", json=body)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    assert response.json()["error"].startswith(says), response.text


def test_the_client_shows_them(client, name, picture):
    with pytest.raises(InferenceServerException, match="model_not_found: there is no model named 'resnet'"):
        client.infer("resnet", [tensor("image", [picture()])])
    with pytest.raises(InferenceServerException, match="has no version '7'"):
        client.infer(name, [tensor("image", [picture()])], model_version="7")
    with pytest.raises(InferenceServerException, match=r"image\[1\]: "):
        client.infer(name, [tensor("image", [picture(), b"no image"])])
    with pytest.raises(InferenceServerException, match="an element of 'labels' is not UTF-8"):
        client.infer(name, [tensor("image", [picture()]), tensor("labels", [b"\xff"])])


def test_a_key_is_asked_for_but_not_by_probes(door, picture):
    assert door.http.get("/v2/health/ready").status_code == door.http.get("/v2/health/live").status_code == 200
    for path in ("/v2", "/v2/models/demo", "/v2/models/demo/ready"):
        assert door.http.get(path).json()["error"].startswith("unauthorized: ")
        assert door.http.get(path, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert door.http.post("/v2/models/demo/infer", json={}).status_code == 401


def binary(elements):
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


@given(st.lists(st.binary(max_size=20), max_size=5), st.lists(st.binary(max_size=20), max_size=3))
def test_elements_come_out_as_they_went_in(images, labels):
    tails = [binary(images), binary(labels)]
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": [len(elements)], "parameters": {"binary_data_size": len(tail)}}
        for name, elements, tail in zip(("image", "labels"), (images, labels), tails, strict=True)
    ]
    text = json.dumps({"inputs": inputs}).encode()
    parsed = parse_infer(text + b"".join(tails), str(len(text)))
    assert parsed.elements == {"image": images, "labels": labels}


@given(st.binary(max_size=40), st.integers(-1, 60))
def test_any_bytes_are_read_or_refused(data, size):
    head = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [head]}).encode()
    try:
        parsed = parse_infer(text + data, str(len(text)))
    except ServiceError as error:
        refusal = error.code
    else:
        refusal = None
        assert binary(parsed.elements["image"]) == data
    assert refusal in (None, "invalid_request")


@pytest.mark.parametrize("length", ["x", "-1", "9" * 30, "1000", "", "٣"])
def test_a_wrong_length_of_the_json_is_refused(length):
    with pytest.raises(ServiceError, match="is not a number from 0 to the body's 2 bytes"):
        parse_infer(b"{}", length)


def test_bytes_that_are_no_inputs_are_refused():
    text = json.dumps({"inputs": [image_input()]}).encode()
    assert parse_infer(text, None).elements == parse_infer(text, str(len(text))).elements
    with pytest.raises(ServiceError, match="1 bytes after the JSON belong to no input"):
        parse_infer(text + b"x", str(len(text)))
