"""Refusals before the body is read reach the clients that are still sending it, with all that they say."""

import http.client
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, closing

import httpx
import pytest
import requests

from raw_http import KEY, MIB, Client, metric, upload, wait_until

SIZE = 7 * MIB
PIECES = 16
REFUSALS = {"unauthorized": 401, "body_too_large": 413, "queue_full": 429}


def pieces(size, seconds):
    """A body, in pieces that take so long in all."""
    for _ in range(PIECES):
        time.sleep(seconds / PIECES)
        yield b" " * (size // PIECES)


def by_urllib(url, headers, body):
    try:
        urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def by_http_client(url, headers, body):
    with closing(http.client.HTTPConnection("127.0.0.1", httpx.URL(url).port, timeout=20)) as connection:
        connection.request("POST", "/v1/classify", body, headers)
        with connection.getresponse() as response:
            answer = response.status, response.headers, response.read()
        connection.request("GET", "/v1/model", headers={"Authorization": f"Bearer {KEY}"})  # it is still good
        assert connection.getresponse().status == 200
        return answer


def by_requests(url, headers, body):
    headers = {name: value for name, value in headers.items() if name != "Content-Length"}  # it has its own opinion
    with requests.post(url, body, headers=headers, timeout=20) as response:
        return response.status_code, response.headers, response.content


def by_httpx(url, headers, body):
    response = httpx.post(url, content=body, headers=headers, timeout=20)
    return response.status_code, response.headers, response.content


@pytest.mark.parametrize("code", REFUSALS)
@pytest.mark.parametrize("ask", [by_urllib, by_http_client, by_requests, by_httpx])
def test_a_client_that_is_still_sending_gets_its_refusal(door, full, ask, code):
    size = 9 * MIB if code == "body_too_large" else SIZE
    key = "none" if code == "unauthorized" else KEY
    headers = {"Content-Type": "application/json", "Content-Length": str(size), "Authorization": f"Bearer {key}"}
    url = f"http://127.0.0.1:{door.port}/v1/classify"
    with full(code == "queue_full"):
        for body in (b" " * size, pieces(size, 0.3)):
            check(code, *ask(url, headers, body))


def check(code, status, headers, body):
    assert status == REFUSALS[code]
    assert json.loads(body)["error"]["code"] == code
    if code == "queue_full":
        assert int(headers["retry-after"]) >= 1


@pytest.fixture
def full(door):
    """full(wanted) -> a context in which the server takes no more bytes."""

    def fill(wanted):
        stack = ExitStack()
        for _ in range(3 if wanted else 0):
            client = stack.enter_context(closing(Client(door)))
            client.sendall(upload(f"Content-Length: {8 * MIB}") + b" " * (6 * MIB + 2**19))
        if wanted:
            wait_until(lambda: metric(door, "vitrine_bytes_in_hand") > 19 * MIB)
        return stack

    yield fill
    wait_until(lambda: metric(door, "vitrine_bytes_in_hand") == 0)


FETCH = """
const [url, size, key] = process.argv.slice(1), headers = {"Content-Type": "application/json", Authorization: key};
const answers = [];
for (const wait of [0, 20]) {
  let left = 16;
  const slow = new ReadableStream({
    async pull(controller) {
      await new Promise((done) => setTimeout(done, wait));
      left-- ? controller.enqueue(new Uint8Array(size / 16).fill(32)) : controller.close();
    },
  });
  const body = wait ? slow : new Uint8Array(+size).fill(32);
  const response = await fetch(url, {method: "POST", headers, body, duplex: "half"});
  answers.push([response.status, {"retry-after": response.headers.get("retry-after")}, await response.text()]);
}
console.log(JSON.stringify(answers));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
@pytest.mark.parametrize("code", REFUSALS)
def test_nodes_fetch_gets_its_refusal(door, full, code):
    size = 9 * MIB if code == "body_too_large" else SIZE
    key = "none" if code == "unauthorized" else KEY
    url = f"http://127.0.0.1:{door.port}/v1/classify"
    with full(code == "queue_full"):
        command = ["node", "--input-type=module", "-e", FETCH, url, str(size), f"Bearer {key}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for answer in json.loads(done.stdout):
        check(code, *answer)
