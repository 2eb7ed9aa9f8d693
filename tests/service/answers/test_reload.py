"""Reloads at once share one, and what leaves service leaves nothing behind."""

import asyncio
import gc
import os
import signal
import threading
import weakref
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broken import BROKEN, copy, field
from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.service.answers import reload
from vitrine.service.answers.reload import Serving
from vitrine.service.engine.runtime import EngineError
from vitrine.service.errors import ServiceError
from vitrine.service.http.application import create_app
from vitrine.service.operations import metrics
from vitrine.service.operations.settings import Settings


class Disk:
    """Opens bundles one at a time, each when it is let; `bundles` lists what was opened."""

    def __init__(self, monkeypatch):
        self.bundles, self.let, self.opening, self.patience = [], threading.Semaphore(0), threading.Event(), 10
        monkeypatch.setattr(reload, "open_bundle", self.open)

    def open(self, path):
        self.opening.set()
        if not self.let.acquire(timeout=self.patience):
            self.patience = 0  # it was one load too many: those behind it need not wait as long
            raise BundleError("nobody let this one be opened")
        self.opening.clear()
        bundle = open_bundle(path)
        self.bundles.append(weakref.ref(bundle))
        return bundle

    async def is_opening(self):
        assert await asyncio.to_thread(self.opening.wait, 30)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def served(bundle_path, tmp_path):
    """A copy of the bundle, which is served."""
    return copy(bundle_path, tmp_path / "served")


@asynccontextmanager
async def serving(path, disk):
    disk.let.release()
    async with Serving(Settings(bundle=path)) as service:
        yield service


def refused():
    return metrics.RELOADS.labels("refused")._value.get()


def open_files():
    """What this process has open, where the system shows it."""
    folder = Path("/proc/self/fd")
    return [os.path.realpath(file) for file in folder.iterdir()] if folder.is_dir() else []


def test_forty_reloads_at_once_are_two(served, disk):
    """One that runs when the others are asked for, and one for all of these: the files may have changed since."""

    async def serve():
        async with serving(served, disk) as service:
            first = service.attributor.model
            early = asyncio.create_task(service.reload())
            await disk.is_opening()
            late = [asyncio.create_task(service.reload()) for _ in range(39)]
            await asyncio.sleep(0)
            disk.let.release()
            assert (await early) == (first, first)
            await disk.is_opening()
            field("logit_scale", 7.0)(served)  # what the second reads was written after the first had read
            disk.let.release()
            answers = await asyncio.gather(*late)
            current = answers[0].current
            assert answers == [(current, first)] * 39
            assert current == service.attributor.model
            assert current.digest == open_bundle(served).digest != first.digest
            assert len(disk.bundles) == 3
            disk.let.release()
            assert (await service.reload()).previous == current  # and the next one is one of its own

    asyncio.run(serve())


def test_all_that_share_a_refused_reload_are_told_and_the_next_is_tried_again(served, disk):
    async def serve():
        async with serving(served, disk) as service:
            before, digest = refused(), service.attributor.model.digest
            early = asyncio.create_task(service.reload())
            await disk.is_opening()
            late = [asyncio.create_task(service.reload()) for _ in range(5)]
            gone = asyncio.create_task(service.reload())  # a client that does not wait for the answer
            await asyncio.sleep(0)
            gone.cancel()
            BROKEN["std 0"][0](served)
            disk.let.release(2)
            for answer in await asyncio.gather(early, *late, return_exceptions=True):
                assert isinstance(answer, BundleError), answer
                assert "preprocessing.std" in str(answer)
            assert refused() - before == 2
            assert service.attributor.model.digest == digest
            field("preprocessing.std", [0.2, 0.2, 0.2])(served)
            disk.let.release()
            assert (await service.reload()).previous.digest == digest

    asyncio.run(serve())


def test_a_reload_that_is_asked_for_at_the_end_is_refused(served, disk):
    async def serve():
        async with serving(served, disk) as service:
            running = asyncio.create_task(service.reload())
            await disk.is_opening()
            waiting = asyncio.create_task(service.reload())
            await asyncio.sleep(0)
            disk.let.release(2)
        assert (await running).current
        return await asyncio.gather(waiting, return_exceptions=True)

    (answer,) = asyncio.run(serve())
    assert not isinstance(answer, Exception) or (isinstance(answer, ServiceError) and answer.code == "not_ready")


def test_what_was_replaced_is_freed_without_a_collection(carded, tmp_path, disk):
    """A full collection holds the GIL, so that no request is answered meanwhile."""
    path = copy(carded.path, tmp_path / "served")

    async def serve():
        async with serving(path, disk) as service:
            attributor = service.attributor
            parts = attributor, attributor.engine, attributor.labels, attributor.batcher, attributor.bundle.cards
            replaced = [weakref.ref(part) for part in parts]
            del attributor, parts
            descriptors = open_files()
            for _ in range(3):
                disk.let.release()
                await service.reload()
            await asyncio.gather(*service._tasks)
            await asyncio.sleep(0)
            *before, current = disk.bundles
            assert not [part() for part in (*replaced, *before) if part() is not None]
            assert current() is service.attributor.bundle
            assert len(open_files()) == len(descriptors)
            BROKEN["tokenizer of more words"][0](path)  # found out when everything else is loaded
            disk.let.release()
            with pytest.raises(EngineError, match="tokenizer"):
                await service.reload()
            cards = [file for file in open_files() if "cards/" in file]
            assert len(cards) == len([file for file in descriptors if "cards/" in file])

    gc.collect()
    gc.disable()
    try:
        asyncio.run(serve())
    finally:
        gc.enable()


def test_a_sighup_while_the_bundle_is_loaded_is_obeyed_when_it_is(served, monkeypatch):
    """By default the signal ends the process."""
    opened, ignored = [], []

    def open_once_asked(path):
        opened.append(path)
        if len(opened) == 1:
            os.kill(os.getpid(), signal.SIGHUP)
        return open_bundle(path)

    async def serve():
        app = create_app(Settings(bundle=served))
        async with app.router.lifespan_context(app), asyncio.timeout(30):
            while len(opened) < 2 and not ignored:
                await asyncio.sleep(0.01)

    monkeypatch.setattr(reload, "open_bundle", open_once_asked)
    previous = signal.signal(signal.SIGHUP, lambda *_: ignored.append(True))  # so that a failure is not the end of all
    try:
        asyncio.run(serve())
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert len(opened) == 2
    assert not ignored
