"""deploy/Dockerfile: its contents; and its target `cpu`, built in a bare Debian and asked for an account.

There the service runs as an engine would run it: as process 1 and the image's user, with read-only files except for
/tmp, and without network. That takes minutes, root, a mirror of Debian and a package index, and is skipped unless
VITRINE_REQUIRE_CHROOT is set, as `make test-image` does.
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

import psutil
import pytest
from dockerfile import TOOLS, Build, UnsupportedError, context_files, debian, inside, pip_configuration, read
from PIL import Image as Picture
from requirements import normalised, pins

from common import ROOT
from vitrine.models.bundle.bundle import open_bundle

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
START_SECONDS = 60  # a bound, not an expectation
GRACE_SECONDS = 35  # compose.yaml's
# Run by this Python in the service's network, which contains only these two; a proxy would be outside it.
ASK = """
import sys, urllib.request as url
asked = url.Request(sys.argv[1], sys.stdin.buffer.read() or None, {"Content-Type": "application/json"})
sys.stdout.buffer.write(url.build_opener(url.ProxyHandler({})).open(asked, timeout=30).read())
"""


@pytest.fixture(scope="module")
def stages():
    return {stage.name: stage for stage in read(DOCKERFILE.read_text())[1]}


def instructions(stages, name, word):
    """Those of the stage and of the stages that it is based on."""
    stage = stages.get(name)
    own = [instruction for instruction in stage.instructions if instruction.word == word] if stage else []
    return instructions(stages, stage.base, word) + own if stage else []


def test_cpu_is_what_is_built_when_no_target_is_named(stages):
    assert list(stages)[-2:] == ["gpu", "cpu"]


def test_gpu_takes_cuda_and_cudnn_from_wheels(stages):
    (install,) = (instruction.text for instruction in stages["build-gpu"].instructions if "pip" in instruction.text)
    assert "--requirement gpu.txt 'onnxruntime-gpu[cuda,cudnn]'" in install
    assert "--constraint constraints.txt" in install
    assert stages["gpu"].base == stages["cpu"].base == "service"
    assert not [instruction for stage in stages.values() for instruction in stage.instructions if "cuda" in stage.base]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_ends_as_a_number_without_rights_in_exec_form(stages, target):
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", instructions(stages, target, "USER")[-1].text)
    for word in ("ENTRYPOINT", "CMD"):
        assert isinstance(json.loads(instructions(stages, target, word)[-1].text), list)
    assert [instruction.text for instruction in instructions(stages, target, "EXPOSE")] == ["3000"]


def test_the_context_has_the_service_and_nothing_else():
    included = {path.parts[0] for path in context_files(ROOT)}
    always = {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", "models", "service", "vitrine"}
    assert always <= included <= always | {"bundles"}
    assert not [path for path in context_files(ROOT) if "__pycache__" in path.parts]


def test_what_is_not_supported_is_refused(tmp_path):
    build = Build("FROM there AS made\nVOLUME /data\n", ROOT, tmp_path, lambda name, root: root.mkdir(), {})
    with pytest.raises(UnsupportedError, match="VOLUME"):
        build.image("made")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    if not os.environ.get("VITRINE_REQUIRE_CHROOT"):
        pytest.skip("takes minutes: `make test-image`, as root")
    assert os.geteuid() == 0, "only root can chroot"
    assert not [tool for tool in TOOLS if not shutil.which(tool)], f"needs {', '.join(TOOLS)}"
    folder = tmp_path_factory.mktemp("image")
    try:
        secrets = {"pip": pip_configuration(folder / "pip.conf")}
        build = Build(DOCKERFILE.read_text(), ROOT, folder, debian, secrets)
        yield build.image("cpu")
    finally:
        shutil.rmtree(folder)  # gigabytes


class Container:
    """A running image, seen from outside and, as by `docker exec`, from inside."""

    def __init__(self, image, process, log):
        self.image, self.process, self.log = image, process, log

    @property
    def first(self):
        """Its process 1, the child of `unshare`."""
        return psutil.Process(self.process.pid).children()[0]

    def execute(self, *command, user=None):
        uid, gid = (user or self.image.user).split(":")
        enter = ["nsenter", f"--target={self.first.pid}", "--all", "--root", "--wd", f"-S{uid}", f"-G{gid}"]
        variables = [f"{key}={value}" for key, value in self.image.environment.items()]
        return subprocess.run([*enter, "env", "-i", *variables, *command], capture_output=True, text=True, timeout=30)

    def ask(self, path, body=None):
        enter = ["nsenter", f"--target={self.first.pid}", "--net", sys.executable, "-c", ASK]
        sent = json.dumps(body).encode() if body else b""
        finished = subprocess.run([*enter, f"http://127.0.0.1:3000{path}"], input=sent, capture_output=True, timeout=60)
        assert not finished.returncode, finished.stderr.decode() + self.log.read_text()
        return finished.stdout

    def is_healthy(self):
        """By the image's own HEALTHCHECK."""
        return self.execute(*self.image.healthcheck).returncode == 0

    def wait_until_healthy(self):
        end = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < end:
            if psutil.Process(self.process.pid).children() and self.is_healthy():
                return
            time.sleep(0.5)
        pytest.fail(f"it did not become healthy; its log:\n{self.log.read_text()}")


@contextmanager
def started(image, log):
    with log.open("w") as output:
        command = inside(image, [*image.entrypoint, *image.command], sealed=True)
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
            try:
                container = Container(image, process, log)
                container.wait_until_healthy()
                yield container
            finally:
                if process.poll() is None:
                    container.first.kill()  # ending process 1 ends all the others


@pytest.fixture(scope="module")
def container(image, tmp_path_factory):
    with started(image, tmp_path_factory.mktemp("container") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def answer(container):
    buffer = io.BytesIO()
    Picture.linear_gradient("L").convert("RGB").save(buffer, "PNG")
    body = {"image_base64": base64.b64encode(buffer.getvalue()).decode(), "explain": {"heatmap": True}}
    return json.loads(container.ask("/v1/attribute", body))


def test_it_gives_an_account_that_adds_up(answer):
    assert answer["model"]["digest"] == open_bundle(ROOT / "models" / "demo").digest
    (explained,) = answer["explanations"]
    rows = [row for value in explained["ledger"].values() for row in (value if isinstance(value, list) else [value])]
    assert sum(rows) == pytest.approx(explained["logit"], abs=1e-4)


def test_the_page_and_the_metrics_are_there(container, answer):
    assert b"<html" in container.ask("/")
    assert b'vitrine_requests_total{endpoint="/v1/attribute",' in container.ask("/metrics")


def test_no_process_is_root(container, answer):
    processes = [container.first, *container.first.children(recursive=True)]
    uid, gid = map(int, container.image.user.split(":"))
    assert (
        {process.uids().real for process in processes} == {process.uids().effective for process in processes} == {uid}
    )
    assert {process.gids().effective for process in processes} == {gid}
    assert uid > 0


def test_nothing_but_tmp_can_be_written(container, answer):
    for folder in ("/", "/bundle", "/venv", "/venv/bin", "/etc", "/home", "/var/tmp", "/usr/lib"):
        for user in (None, "0:0"):
            attempt = container.execute("touch", f"{folder}/new", user=user)
            assert attempt.returncode, folder
        assert "Read-only file system" in attempt.stderr  # even for root
    assert container.execute("touch", "/tmp/new").returncode == 0


def test_the_network_is_loopback_alone(container):
    lines = container.execute("cat", "/proc/net/dev").stdout.splitlines()[2:]
    assert [line.split(":")[0].strip() for line in lines] == ["lo"]


def test_sigterm_ends_it(image, tmp_path):
    with started(image, tmp_path / "log") as running:
        running.first.send_signal(signal.SIGTERM)
        assert running.process.wait(GRACE_SECONDS) == 0, running.log.read_text()


def test_the_image_holds_the_pinned_versions_and_no_more(image):
    (packages,) = (image.root / "venv/lib").glob("python3.*/site-packages")
    pinned = pins((ROOT / "constraints.txt").read_text().splitlines())
    installed = {normalised(package.name): package.version for package in distributions(path=[str(packages)])}
    version = installed.pop("vitrine")
    assert version == image.labels["org.opencontainers.image.version"]
    assert {name: pinned.get(name) for name in installed} == installed
    assert "onnxruntime" in installed
    assert not installed.keys() & {"torch", "onnxruntime-gpu", "pip", "setuptools", "pytest"}


def test_the_image_has_no_training_no_tests_and_one_bundle(image):
    (code,) = (image.root / "venv/lib").glob("python3.*/site-packages/vitrine")
    assert sorted(path.name for path in code.iterdir() if path.is_dir()) == [
        "__pycache__",
        "commands",
        "models",
        "service",
    ]
    assert [path.relative_to(image.root) for path in image.root.glob("*/**/manifest.json")] == [
        Path("bundle/manifest.json")
    ]
