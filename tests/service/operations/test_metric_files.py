"""Metrics where there is no room for their files: kept in memory, with one warning, and never a dead worker."""

import subprocess
import textwrap

import pytest

# Under a limit on the size of files: one of 64 KiB (the first size), or none at all. Old code raises, or dies by SIGBUS
# where the file is made and the disk is full.
PROGRAM = textwrap.dedent("""
    import logging, resource, sys
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
    from vitrine.service.operations import metric_files, metrics
    metric_files.log_problems()
    for number in range(1500):  # over 64 KiB
        metrics.REQUESTS.labels(f"/endpoint/{number}/with/a/name/of/some/length", 200).inc(number)
    lines = metrics.exposition().decode().splitlines()
    found = [line for line in lines if line.startswith("vitrine_requests_total{")]
    assert len(found) == 1500, len(found)
    assert sum(float(line.rsplit(" ", 1)[1]) for line in found) == 1500 * 1499 / 2
    metrics.REQUESTS.labels("/endpoint/7/with/a/name/of/some/length", 200).inc(0.5)
    assert "7.5" in metrics.exposition().decode()
""")


@pytest.mark.parametrize("limit", [10, 65_536, 10**9], ids=["no room", "no room to grow", "room"])
def test_no_room(run_python, tmp_path, limit):
    folder = tmp_path / "metrics"
    folder.mkdir()
    finished = run_python("-c", PROGRAM, limit, PROMETHEUS_MULTIPROC_DIR=folder)
    assert finished.returncode == 0, finished.stderr
    warnings = [line for line in finished.stdout.splitlines() if "no space for metrics" in line]
    assert len(warnings) == (limit < 10**9)
    # Another worker's sum leaves out what is in that one's memory, and is no worse for it.
    other = run_python(
        "-c", "from vitrine.service.operations import metrics; print(metrics.exposition().decode())",
        PROMETHEUS_MULTIPROC_DIR=folder,
    )  # fmt: skip
    assert other.returncode == 0, other.stderr
    assert ("vitrine_requests_total{" in other.stdout) == (limit > 10)


def test_a_folder_that_is_gone(run_python, tmp_path):
    finished = run_python("-c", PROGRAM, 10**9, PROMETHEUS_MULTIPROC_DIR=tmp_path / "nowhere")
    assert finished.returncode == 0, finished.stderr


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 64 KiB, all of it taken."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr}")
    try:
        (folder / "fill").write_bytes(bytes(65_536))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_server_on_a_full_disk(full_disk, start_server, bundle_path, picture):
    with start_server(VITRINE_BUNDLE=bundle_path, BENTOML_HOME=full_disk) as server:
        (worker,) = server.workers
        server.attribute(picture())
        lines = server.http.get("/metrics").text.splitlines()
        assert 'vitrine_requests_total{endpoint="/v1/attribute",status="200"} 1.0' in lines
        assert worker.pid == server.workers[0].pid
        assert server.log.read_text().count("no space for metrics") == 1
