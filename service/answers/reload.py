"""The bundle in service and its successor: requests keep the one that they began with, so no answer mixes two.

What is loaded by then is frozen (`gc.freeze`): a full collection over it holds the interpreter for 80 ms and more,
every few seconds under load, and never finds anything. A bundle that has left service is thawed and collected once.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.label_sets import LabelSetError
from vitrine.service.answers.attributor import Attributor
from vitrine.service.engine.runtime import EngineError
from vitrine.service.errors import ServiceError
from vitrine.service.operations import metrics
from vitrine.service.operations.keys import Keys
from vitrine.service.operations.logs import logger
from vitrine.service.operations.settings import Settings, SettingsError

REFUSED = (BundleError, LabelSetError, EngineError, SettingsError)  # what a bundle, or what is set, may be wrong in


class _Generation:
    """An attributor and how many requests it is answering."""

    def __init__(self, attributor: Attributor) -> None:
        self.attributor, self.users, self.unused = attributor, 0, asyncio.Event()


class Serving:
    """Use as an async context manager; entering it loads what the settings name and may raise one of `REFUSED`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._now: _Generation | None = None
        self._loading = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self.api_keys, self.admin_keys = read_keys(settings)

    async def __aenter__(self) -> Serving:
        self._now = await self._load()
        self._announce(self._now.attributor)
        gc.freeze()
        return self

    async def __aexit__(self, *_: object) -> None:
        gc.unfreeze()
        async with self._loading:  # what is being loaded comes into service first, so that it is closed with the rest
            now, self._now = self._now, None
        await asyncio.gather(*self._retiring)
        if now:
            await now.attributor.__aexit__()

    @property
    def attributor(self) -> Attributor | None:
        """The one that new requests get; None before the first is loaded and after the last is closed."""
        return self._now.attributor if self._now else None

    @contextmanager
    def lease(self) -> Iterator[Attributor]:
        """The attributor for the whole of one request. Raises `ServiceError` not_ready."""
        generation = self._now
        if generation is None:
            raise _not_ready()
        generation.users += 1
        try:
            yield generation.attributor
        finally:
            generation.users -= 1
            if not generation.users:
                generation.unused.set()

    async def reload(self) -> tuple[Attributor, Attributor]:
        """Load the bundle, the label sets and the keys that the settings name, as they are now, beside those in
        service, then let new requests have them: (those now, those before), which are closed after their last answer.

        Raises one of `REFUSED`, everything is as before then; or `ServiceError` not_ready where nothing is in service.
        """
        async with self._loading:
            before = self._now
            if before is None:
                raise _not_ready()
            try:
                now = await self._load_all()
            except REFUSED as error:
                metrics.RELOADS.labels("refused").inc()
                logger.error("reload refused, the bundle in service stays: %s", error)
                raise
            metrics.RELOADS.labels("taken").inc()
            self._now = now
            before.attributor.withdraw()
            self._announce(now.attributor)
        task = asyncio.create_task(self._retire(before))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return now.attributor, before.attributor

    async def reload_by_signal(self) -> None:
        """The same; a refusal is logged."""
        with suppress(*REFUSED, ServiceError):
            await self.reload()

    async def _load_all(self) -> _Generation:
        made = await self._load()
        try:
            self.api_keys, self.admin_keys = read_keys(self.settings)
        except SettingsError:
            await made.attributor.__aexit__()
            raise
        return made

    async def _load(self) -> _Generation:
        bundle = await asyncio.to_thread(open_bundle, self.settings.bundle)
        attributor = await Attributor(bundle, self.settings).__aenter__()
        return _Generation(attributor)

    def _announce(self, attributor: Attributor) -> None:
        attributor.announce()
        name, digest, provider = attributor.model.name, attributor.model.digest, attributor.engine.provider
        logger.info("serving bundle %s %s on %s", name, digest, provider)

    async def _retire(self, generation: _Generation) -> None:
        while generation.users:
            generation.unused.clear()  # it was unused now and then before
            await generation.unused.wait()
        await generation.attributor.__aexit__()
        del generation
        gc.unfreeze()
        gc.collect()
        gc.freeze()


def _not_ready() -> ServiceError:
    return ServiceError("not_ready", "no bundle is in service, yet or any more; see /readyz")


def read_keys(settings: Settings) -> tuple[Keys, Keys]:
    """(of the API, of the administration). Raises `SettingsError`."""
    return (
        Keys("api_keys", settings.api_keys, settings.api_keys_file),
        Keys("admin_keys", settings.admin_keys, settings.admin_keys_file),
    )
