"""Graphs that are opened with the first request that needs them."""

import asyncio
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from broken import replace_file
from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.layout import RESIDUAL_TRACE
from vitrine.service.answers.attribute import answer_attribute
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.circuit import answer_circuit
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.residual import ResidualGraphs
from vitrine.service.engine.runtime import EngineError
from vitrine.service.errors import ServiceError
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import AttributeRequest
from vitrine.service.schemas.circuit import CircuitRequest

RESIDUAL = AttributeRequest(explain={"residual": True})


@pytest.fixture
def openings(monkeypatch):
    """The openings of residual graphs so far, by thread; what is put into `fail` is raised by the next."""
    opened, fail, open_sessions = [], [], ResidualGraphs.open_sessions

    def counted(graphs):
        opened.append(threading.get_ident())
        if fail:
            raise fail.pop()
        return open_sessions(graphs)

    monkeypatch.setattr(ResidualGraphs, "open_sessions", counted)
    return opened, fail


def test_many_threads_open_them_once(with_residual, openings):
    engine = Engine(with_residual, Settings(bundle=with_residual.path))
    assert not engine.residual.is_open
    with ThreadPoolExecutor(8) as pool:
        sessions = list(pool.map(lambda _: engine.residual.open(), range(8)))
    assert all(found is sessions[0] for found in sessions)
    assert len(openings[0]) == 1


def test_only_who_asks_for_them_opens_them(with_residual, picture, openings):
    async def ask():
        async with Attributor(with_residual, Settings(bundle=with_residual.path)) as attributor:
            await answer_attribute(attributor, picture(), AttributeRequest(), "plain")
            graphs = attributor.engine.sources, attributor.engine.residual
            assert [one.is_open for one in graphs] == [False, False]
            await asyncio.gather(*(answer_attribute(attributor, picture(), RESIDUAL, "residual") for _ in range(4)))
            assert [one.is_open for one in graphs] == [False, True]
            await answer_circuit(attributor, picture(), CircuitRequest(), "clt")
            assert [one.is_open for one in graphs] == [True, True]
            threads = await attributor.batcher.run(threading.get_ident), threading.get_ident()
            assert not {*threads} & {*openings[0]}  # neither the engine's thread nor the event loop's waits

    asyncio.run(ask())
    assert len(openings[0]) == 1


def test_a_failed_opening_is_told_to_all_that_wait_and_tried_again(with_residual, picture, openings, caplog):
    opened, fail = openings
    fail.append(EngineError("no memory for it"))

    async def ask():
        async with Attributor(with_residual, Settings(bundle=with_residual.path)) as attributor:
            graphs = attributor.engine.residual
            failed = await asyncio.gather(*(attributor.open(graphs) for _ in range(3)), return_exceptions=True)
            await answer_attribute(attributor, picture(), RESIDUAL, "again")
            return failed

    for error in asyncio.run(ask()):
        assert isinstance(error, ServiceError)
        assert error.code == "internal"
        assert "the graphs of residual SAEs of the bundle 'tiny' cannot be opened" in error.message
        assert "no memory" not in error.message  # that is for the log, once
    assert caplog.text.count("no memory for it") == 1
    assert len(opened) == 2


def test_who_goes_away_stops_no_opening_and_no_end_leaves_one(with_residual, picture, openings):
    async def ask():
        async with Attributor(with_residual, Settings(bundle=with_residual.path)) as attributor:
            question = asyncio.create_task(answer_attribute(attributor, picture(), RESIDUAL, "residual"))
            while not openings[0]:
                await asyncio.sleep(0.001)
            question.cancel()
        return attributor.engine.residual.is_open

    assert asyncio.run(ask())


def test_files_changed_since_they_were_verified_are_not_opened(with_residual, tmp_path):
    bundle = open_bundle(shutil.copytree(with_residual.path, tmp_path / "copy"))
    engine = Engine(bundle, Settings(bundle=bundle.path))
    replace_file(bundle.path / RESIDUAL_TRACE, (bundle.path / RESIDUAL_TRACE).read_bytes())
    with pytest.raises(BundleError, match=f"{RESIDUAL_TRACE} has changed since it was verified"):
        engine.residual.open()
