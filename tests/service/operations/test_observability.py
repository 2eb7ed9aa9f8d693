"""Logs, traces and the metrics that come with an explanation, of real servers."""

import gzip
import json
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


def log_lines(server, **fields):
    """The log lines of requests with these fields; waits until there are some."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
        requests = [line["request"] for line in lines if "request" in line]
        if matches := [request for request in requests if fields.items() <= request.items()]:
            return matches
        time.sleep(0.05)
    pytest.fail(f"no line with {fields} in:\n{server.log.read_text()}")


def test_every_request_is_one_json_line_with_its_id_and_trace(server, picture):
    server.post("/v1/attribute", picture(), **{"X-Request-ID": "my-request", "traceparent": TRACEPARENT})
    (line,) = log_lines(server, id="my-request")
    assert line.pop("ms") > 0
    assert line == {"id": "my-request", "endpoint": "/v1/attribute", "status": 200, "trace_id": TRACE}
    server.post("/v1/attribute", b"no image", **{"X-Request-ID": "my-mistake"})
    (line,) = log_lines(server, id="my-mistake")
    assert (line["status"], line["error"]) == (415, "unsupported_image")


def test_neither_images_nor_labels_are_logged_nor_probes_nor_scrapes(server, picture):
    size = server.log.stat().st_size
    request = {"labels": ["a secret label", "another one"], "explain": {"targets": ["a secret label"]}}
    server.post("/v1/attribute", picture(), request, **{"X-Request-ID": "the-last"})
    for path in ("/metrics", "/livez", "/readyz"):
        server.http.get(path)
    server.http.get("/nowhere/else?secret=1", headers={"X-Request-ID": "nowhere"})
    (line,) = log_lines(server, id="nowhere")
    assert (line["endpoint"], line["status"]) == ("other", 404)
    written = server.log.read_text()[size:]
    assert "secret" not in written
    assert len(written.splitlines()) == 2


def test_every_line_of_the_log_is_json(server, picture):
    server.attribute(picture())
    lines = server.log.read_text().splitlines()
    assert len(lines) > 3
    for line in lines:
        assert {"time", "level", "logger", "message"} <= set(json.loads(line))


@contextmanager
def collector():
    """A stand-in for an OpenTelemetry collector: (its endpoint, the spans that it received)."""
    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1/traces", spans
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def test_stages_are_spans_of_the_callers_trace_and_log_settings_are_kept(start_server, bundle_path, picture):
    with collector() as (endpoint, spans):
        environment = {"VITRINE_TRACE_ENDPOINT": endpoint, "VITRINE_LOG_FORMAT": "text", "VITRINE_LOG_LABELS": "true"}
        with start_server(python=sys.executable, VITRINE_BUNDLE=bundle_path, **environment) as server:
            label = server.post("/v1/attribute", picture(), traceparent=TRACEPARENT).json()["predictions"][0]["label"]
            end = time.monotonic() + 10  # the answer is sent before its line is logged
            while TRACE not in (text := server.log.read_text()) and time.monotonic() < end:
                time.sleep(0.05)
        assert "POST /v1/attribute 200 id=" in text
        assert f"predicted=['{label}']" in text
        assert TRACE in text
    of_trace = [span for span in spans if span.trace_id.hex() == TRACE]
    stages = {"decode", "labels", "queue", "inference", "ledger"}
    assert stages <= {span.name for span in of_trace}
    by_id = {span.span_id: span for span in of_trace}
    for span in of_trace:
        if span.name in stages:
            ancestors = [span]
            while ancestors[-1].parent_span_id in by_id:
                ancestors.append(by_id[ancestors[-1].parent_span_id])
            assert ancestors[-1].parent_span_id.hex() == TRACEPARENT.split("-")[2]
            assert len(ancestors) > 1
            assert ancestors[-1].start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= ancestors[-1].end_time_unix_nano


def samples(server):
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_explanations_and_refusals_are_measured(server, picture, bundle):
    before = samples(server)
    server.attribute(picture(), labels=["never", "seen", "before"])
    server.attribute(picture(), labels=["never", "seen", "before"])
    answer = server.attribute(picture())
    server.post("/v1/attribute", b"no image")
    files = [("image", ("a", picture())), ("image", ("b", b"no image"))]
    server.http.post("/v1/attribute:batch", files=files)
    after = samples(server)

    def increase(name, **labels):
        key = (f"vitrine_{name}", frozenset(labels.items()))
        return after[key] - before.get(key, 0)

    agrees = answer["fidelity"]["reconstructed_top1_agrees"]
    assert increase("reconstructed_top1_total", agrees=str(agrees).lower()) >= 2
    assert increase("fidelity_r2_count") == increase("error_share_count") == 4
    assert increase("labels_total", source="encoder") == 3
    assert increase("labels_total", source="cache") == 9  # three, then the default set twice
    assert increase("rejected_total", code="unsupported_image") == 2
    assert increase("batch_images_sum") == 4
    shares = [layer["share"] for layer in answer["explanations"][0]["layers"]]
    for layer in range(len(shares)):
        assert increase("layer_share_count", layer=str(layer)) == 4
    assert after["vitrine_images_in_flight", frozenset()] == after["vitrine_queue_images", frozenset()] == 0


def test_bentoml_serve_that_asks_before_vitrine_is_imported_is_told_not_to_track(run_python):
    code = """
from bentoml._internal.utils.analytics import usage_stats
assert not usage_stats.do_not_track()
import vitrine.service.app
assert usage_stats.do_not_track()
"""
    finished = run_python("-c", code, BENTOML_DO_NOT_TRACK="")
    assert finished.returncode == 0, finished.stderr
