"""Servers end: soon after SIGTERM whatever hangs, and with a sentence when they cannot start."""

import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from broken import copy, short_fold
from common import free_port


@pytest.fixture
def unloadable(bundle_path, tmp_path):
    """A bundle whose files are as its manifest says, but do not fit together: found out by loading it."""
    path = copy(bundle_path, tmp_path / "unloadable")
    short_fold(path)
    return path


def test_workers_that_cannot_start_end_the_server_with_their_reason(run_python, unloadable):
    finished = run_python("-m", "vitrine", "serve", "--port", free_port(), VITRINE_BUNDLE=unloadable, VITRINE_WORKERS=2)
    assert finished.returncode == 1, finished.stderr
    assert re.match(r"error: .*fold\.npy", finished.stderr), finished.stderr
    assert finished.stderr.count("fold.npy") == 1
    assert "Traceback" not in finished.stderr + finished.stdout


def test_label_sets_that_cannot_be_read_stop_the_start_with_a_sentence(run_python, bundle_path, tmp_path):
    (tmp_path / "pets.json").write_text("{")
    environment = {"VITRINE_BUNDLE": bundle_path, "VITRINE_LABEL_SETS": tmp_path}
    finished = run_python("-m", "vitrine", "serve", "--port", free_port(), **environment)
    assert finished.returncode == 1
    assert re.match(r"error: .*pets\.json", finished.stderr), finished.stderr
    assert "Traceback" not in finished.stderr + finished.stdout


COMMANDS = {"vitrine": ("-m", "vitrine", "serve"), "bentoml": ("-m", "bentoml", "serve", "vitrine.service.app:Vitrine")}


@pytest.mark.parametrize("command", COMMANDS)
def test_sigterm_ends_the_server_whatever_hangs(start_server, bundle_path, picture, command):
    """An image that is stuck in its decoder, and a client that holds its connection open."""
    environment = {"VITRINE_BUNDLE": bundle_path, "VITRINE_SHUTDOWN_SECONDS": 2, "VITRINE_DECODE_SECONDS": 100}
    with (
        start_server(COMMANDS[command], **environment) as server,
        ThreadPoolExecutor() as clients,
        socket.create_connection(("127.0.0.1", server.port)) as client,
    ):
        (worker,) = server.workers
        decoders = worker.children()
        assert len(decoders) == 2
        for decoder in decoders:
            decoder.suspend()
        stuck = clients.submit(server.post, "/v1/attribute", picture())
        client.sendall(b"POST /v1/attribute HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
        end = time.monotonic() + 30
        while "vitrine_images_in_flight 1.0" not in server.http.get("/metrics").text:
            assert time.monotonic() < end
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(15)
        with pytest.raises(httpx.TransportError):
            stuck.result()
        for decoder in decoders:
            decoder.resume()  # the end of its socket ends it
        _, alive = psutil.wait_procs([worker, *decoders], timeout=15)
        assert not alive
        assert "Traceback" not in server.log.read_text()
        assert "2 s after the signal to stop" in server.log.read_text()


def test_an_image_that_takes_too_long_is_refused_and_the_server_goes_on(start_server, bundle_path, picture, encode):
    noise = np.random.default_rng(0).integers(0, 255, (3000, 4000), dtype=np.uint8)
    with start_server(VITRINE_BUNDLE=bundle_path, VITRINE_DECODE_SECONDS=0.05) as server:
        response = server.post("/v1/attribute", encode(Image.fromarray(noise), "PNG", compress_level=1))
        assert (response.status_code, response.json()["error"]["code"]) == (413, "image_too_costly")
        assert server.http.get("/readyz").status_code == 200
        assert server.attribute(picture())["predictions"]
        assert 'vitrine_decoder_restarts_total{reason="timeout"} 1.0' in server.http.get("/metrics").text
