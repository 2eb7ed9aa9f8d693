"""The OpenAPI document is accurate: schemathesis sends requests that it allows, and many that it does not.

Two of its checks do not apply. Random bytes are not an image, which no schema can say (positive_data_acceptance); and
its multipart encoder sends nothing at all for an empty list instead of an object, which is then a valid request
(negative_data_rejection).
"""

import re
import subprocess
import sys
from pathlib import Path

CASES = "60"  # per operation, besides those of its coverage phase


def test_schemathesis_finds_nothing(server, tmp_path):
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"http://127.0.0.1:{server.port}/openapi.json"]
    options = ["--max-examples", CASES, "--checks", "all", "--generation-deterministic", "--no-color"]
    options += ["--phases", "coverage,fuzzing", "--continue-on-failure", "--warnings", "off"]
    options += ["--exclude-checks", "positive_data_acceptance,negative_data_rejection"]
    finished = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stdout[-6_000:] + finished.stderr[-2_000:]
    generated = re.search(r"([\d,]+) generated", finished.stdout)
    assert generated, finished.stdout[-2_000:]
    assert int(generated[1].replace(",", "")) > 500
    assert server.log.read_text().count('"status": 5') == 0
