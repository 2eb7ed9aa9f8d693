"""One server whose bundle is a symbolic link: whatever the link comes to name, answers are of the bundle in service."""

import os
import shutil
import signal
import time

import pytest

from broken import BROKEN, copy

KEY = {"Authorization": "Bearer let me in"}


@pytest.fixture(scope="module")
def served(carded, tmp_path_factory):
    """(the link, the directory that it names at first)."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "link").symlink_to(copy(carded.path, folder / "first"))
    return folder / "link", folder / "first"


@pytest.fixture(scope="module")
def running(start_server, served, tmp_path_factory):
    sets = tmp_path_factory.mktemp("sets")
    (sets / "pets.json").write_text('{"labels": ["cat", "dog"]}')
    with start_server(VITRINE_BUNDLE=served[0], VITRINE_LABEL_SETS=sets, VITRINE_ADMIN_KEYS="let me in") as server:
        server.sets = sets
        yield server


def point(link, target):
    link.with_name("new").symlink_to(target)
    os.replace(link.with_name("new"), link)


def reload(server):
    return server.http.post("/admin/reload", headers=KEY)


def answers(server, image):
    """Everything that comes from files of the bundle."""
    paths = "/v1/features?limit=3", "/v1/features/0/5", "/v1/features/2/63", "/v1/labels", "/v1/model"
    got = [server.http.get(path) for path in paths] + [server.post("/v1/similar", image)]
    assert [response.status_code for response in got] == [200] * len(got), [response.text[:200] for response in got]
    bodies = [response.json() for response in got]
    for body in bodies:
        body.pop("request_id", None)
        body.pop("timings_ms", None)
    return bodies


def counted(server, outcome):
    lines = server.http.get("/metrics").text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith(f'vitrine_reloads_total{{outcome="{outcome}"}}')
    )


SAMPLE = (
    "scale that overflows",
    "std NaN",
    "no labels",
    "layers without end",
    "another image size",
    "another context",
    "attention.npy unlisted",
    "attention.npy gone",
    "directions NaN",
    "text NaN",
    "text of another width",
    "tokenizer without padding",
    "tokenizer of more words",
    "label set NaN",
)


def test_bundles_that_do_not_fit_are_refused_one_after_another(running, served, bundle_path, picture, tmp_path):
    link, first = served
    known, before = answers(running, picture()), counted(running, "refused")
    for number, case in enumerate(SAMPLE):
        change, words = BROKEN[case]
        path = copy(bundle_path, tmp_path / str(number))
        change(path)
        point(link, path)
        if number % 7:
            error = reload(running)
            assert error.status_code == 409, (case, error.text)
            assert error.json()["error"]["code"] == "bundle_refused"
            message = error.json()["error"]["message"]
            assert not [word for word in words if word not in message], message
            assert message.endswith(f"{known[-2]['digest']} stays in service")
        else:
            running.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 30
        while counted(running, "refused") < before + number + 1:
            assert time.monotonic() < end, case
            time.sleep(0.05)
    assert counted(running, "refused") == before + len(SAMPLE)
    assert running.log.read_text().count("reload refused") >= len(SAMPLE)
    assert answers(running, picture()) == known
    point(link, first)
    assert reload(running).status_code == 200


def test_label_sets_that_cannot_be_read_are_refused(running):
    def refused(name, make):
        file = running.sets / name
        make(file)
        error = reload(running)
        assert error.status_code == 409, error.text
        assert file.name in error.json()["error"]["message"]
        shutil.rmtree(file) if file.is_dir() else file.unlink()

    refused("folder.json", lambda file: file.mkdir())
    refused("latin.json", lambda file: file.write_bytes('{"labels": ["Bär"]}'.encode("latin-1")))
    refused("nowhere.json", lambda file: file.symlink_to(file.with_name("nothing")))
    refused("pipe.json", lambda file: os.mkfifo(file))
    refused("twice.json", lambda file: file.write_text('{"labels": ["cat", "cat"]}'))
    for number in range(1_000):
        (running.sets / f"n{number}.json").touch()
    error = reload(running)
    assert error.status_code == 409
    assert "1,001 label sets; at most 1,000" in error.json()["error"]["message"]
    for number in range(1_000):
        (running.sets / f"n{number}.json").unlink()
    assert reload(running).status_code == 200


def to_another(link, directory, other):
    point(link, other)


def to_nothing(link, directory, other):
    point(link, other / "nowhere")


def directory_replaced(link, directory, other):
    directory.rename(directory.with_name("away"))
    shutil.copytree(other, directory)


def tables_replaced(link, directory, other):
    for file in (other / "cards").iterdir():
        shutil.copy(file, directory / "new")
        os.replace(directory / "new", directory / "cards" / file.name)


def directory_gone(link, directory, other):
    shutil.rmtree(directory)


@pytest.mark.parametrize("change", [to_another, to_nothing, directory_replaced, tables_replaced, directory_gone])
def test_answers_are_of_the_bundle_in_service(running, served, carded, picture, tmp_path, change):
    link, _ = served
    directory, other = copy(carded.path, tmp_path / "directory"), copy(carded.path, tmp_path / "other")
    for file in (other / "cards").iterdir():  # no cards at all: an answer from these would not be one
        file.unlink()
        file.write_bytes(b"another bundle's")
    point(link, directory)
    assert reload(running).status_code == 200
    known = answers(running, picture())
    change(link, directory, other)
    assert answers(running, picture()) == known
    assert reload(running).status_code == 409
    assert answers(running, picture()) == known
