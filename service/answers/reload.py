"""The bundle in service and its successor. A request keeps the bundle that it started with, so no answer mixes two.

Loaded objects are frozen (`gc.freeze`): a full collection over them would hold the GIL for 80 ms and more, every few
seconds under load, and never free anything. A bundle that has left service is unfrozen and collected once.
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

RELOAD_ERRORS = (BundleError, LabelSetError, EngineError, SettingsError)  # errors in a bundle or in the settings


class _Instance:
    """An attributor and the number of requests that use it."""

    def __init__(self, attributor: Attributor) -> None:
        self.attributor, self.users, self.unused = attributor, 0, asyncio.Event()


class Serving:
    """The bundle in service, with the API keys.

    Use as an async context manager; entering it loads what the settings name and may raise one of `RELOAD_ERRORS`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._current: _Instance | None = None
        self._loading = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self.api_keys, self.admin_keys = read_keys(settings)

    async def __aenter__(self) -> Serving:
        self._current = await self._load()
        self._announce(self._current.attributor)
        gc.freeze()
        return self

    async def __aexit__(self, *_: object) -> None:
        gc.unfreeze()
        async with self._loading:  # wait for a reload in progress, so that its bundle is closed, too
            current, self._current = self._current, None
        await asyncio.gather(*self._retiring)
        if current:
            await current.attributor.__aexit__()

    @property
    def attributor(self) -> Attributor | None:
        """The attributor for new requests; None before the first is loaded and after the last is closed."""
        return self._current.attributor if self._current else None

    @contextmanager
    def lease(self) -> Iterator[Attributor]:
        """The attributor, held for the duration of one request. Raises `ServiceError` not_ready."""
        instance = self._current
        if instance is None:
            raise _not_ready()
        instance.users += 1
        try:
            yield instance.attributor
        finally:
            instance.users -= 1
            if not instance.users:
                instance.unused.set()

    async def reload(self) -> tuple[Attributor, Attributor]:
        """Load the bundle, label sets and keys that the settings name, as they are now, while the previous ones stay in
        service; then use them for new requests. Returns (current, previous), closing the latter after its last answer.

        Raises one of `RELOAD_ERRORS`, which leaves everything as before, or `ServiceError` not_ready if nothing is in
        service.
        """
        async with self._loading:
            previous = self._current
            if previous is None:
                raise _not_ready()
            try:
                current = await self._load_with_keys()
            except RELOAD_ERRORS as error:
                metrics.RELOADS.labels("refused").inc()
                logger.error("reload refused, the bundle in service stays: %s", error)
                raise
            metrics.RELOADS.labels("taken").inc()
            self._current = current
            previous.attributor.withdraw()
            self._announce(current.attributor)
        task = asyncio.create_task(self._retire(previous))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return current.attributor, previous.attributor

    async def reload_by_signal(self) -> None:
        """The same, without raising; a refusal is logged."""
        with suppress(*RELOAD_ERRORS, ServiceError):
            await self.reload()

    async def _load_with_keys(self) -> _Instance:
        instance = await self._load()
        try:
            self.api_keys, self.admin_keys = read_keys(self.settings)
        except SettingsError:
            await instance.attributor.__aexit__()
            raise
        return instance

    async def _load(self) -> _Instance:
        bundle = await asyncio.to_thread(open_bundle, self.settings.bundle)
        in_service = self._current.attributor.batcher if self._current else None
        attributor = await Attributor(bundle, self.settings, in_service).__aenter__()
        return _Instance(attributor)

    def _announce(self, attributor: Attributor) -> None:
        attributor.announce()
        name, digest, provider = attributor.model.name, attributor.model.digest, attributor.engine.provider
        logger.info("serving bundle %s %s on %s", name, digest, provider)

    async def _retire(self, instance: _Instance) -> None:
        while instance.users:
            instance.unused.clear()  # may be set from an earlier idle moment
            await instance.unused.wait()
        await instance.attributor.__aexit__()
        del instance
        gc.unfreeze()
        gc.collect()
        gc.freeze()


def _not_ready() -> ServiceError:
    return ServiceError("not_ready", "no bundle is in service, yet or any more; see /readyz")


def read_keys(settings: Settings) -> tuple[Keys, Keys]:
    """(API keys, admin keys). Raises `SettingsError`."""
    return (
        Keys("api_keys", settings.api_keys, settings.api_keys_file),
        Keys("admin_keys", settings.admin_keys, settings.admin_keys_file),
    )
