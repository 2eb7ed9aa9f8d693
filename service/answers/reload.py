"""The bundle in service and its successor. A request keeps the bundle that it started with, so no answer mixes two.

What is loaded at the start is frozen (`gc.freeze`): a full collection over it would hold the GIL for 80 ms and more,
every few seconds under load, and never free anything. A bundle that has left service needs no collection: it is part of
no cycle, so its memory is free with the last reference (tested).
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.label_sets import LabelSetError
from vitrine.models.interventions.edit import EditError
from vitrine.service.answers.attributor import Attributor
from vitrine.service.engine.runtime import EngineError
from vitrine.service.errors import ServiceError
from vitrine.service.operations import metrics
from vitrine.service.operations.keys import Keys
from vitrine.service.operations.logs import logger
from vitrine.service.operations.settings import Settings, SettingsError
from vitrine.service.schemas.base import Model

# errors in a bundle, in what lies beside it, or in the settings
RELOAD_ERRORS = (BundleError, LabelSetError, EditError, EngineError, SettingsError)
Result = TypeVar("Result")


class Reloaded(NamedTuple):
    """What a reload did."""

    current: Model
    previous: Model


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
        self._next: asyncio.Task[Reloaded] | None = None  # a reload that has read nothing yet
        self._tasks: set[asyncio.Task[Any]] = set()  # reloads, and bundles that leave service
        self.api_keys, self.admin_keys = read_keys(settings)

    async def __aenter__(self) -> Serving:
        async with self._loading:  # a reload that is asked for meanwhile comes after it
            self._current = await self._load()
        self._announce(self._current.attributor)
        gc.freeze()
        return self

    async def __aexit__(self, *_: object) -> None:
        gc.unfreeze()
        async with self._loading:  # wait for a reload in progress, so that its bundle is closed, too
            current, self._current = self._current, None
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if current:
            await _close(current)

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

    async def reload(self) -> Reloaded:
        """Load the bundle, label sets, edits and keys that the settings name, as they are now, while the previous ones
        stay in service; then use them for new requests. Returns (current, previous), closing the latter after its last
        answer.

        One reload runs at a time. All that are asked for meanwhile are answered by one more: it reads what is there
        after each of them was asked for.

        Raises one of `RELOAD_ERRORS`, which leaves everything as before, or `ServiceError` not_ready if nothing is in
        service. A caller that is cancelled stops no reload.
        """
        if self._next is None:
            self._next = self._start(self._reload())
            self._next.add_done_callback(_ignore_error)
        return await asyncio.shield(self._next)

    async def reload_by_signal(self) -> None:
        """The same, without raising; a refusal is logged."""
        with suppress(*RELOAD_ERRORS, ServiceError):
            await self.reload()

    async def _reload(self) -> Reloaded:
        async with self._loading:
            self._next = None  # from here on files are read: whoever asks now needs another reload
            previous = self._current
            if previous is None:
                raise _not_ready()
            outcome = "refused"
            try:
                current = await self._load_with_keys()
                outcome = "taken"
            except RELOAD_ERRORS as error:
                logger.error("reload refused, the current bundle stays in service: %s", error)
                raise
            except Exception:
                logger.exception("reload failed, the current bundle stays in service")
                raise
            finally:
                metrics.RELOADS.labels(outcome).inc()
            self._current = current
            previous.attributor.withdraw()
            self._announce(current.attributor)
        self._start(_retire(previous))
        return Reloaded(current.attributor.model, previous.attributor.model)

    def _start(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """A task that nobody need wait for."""
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load_with_keys(self) -> _Instance:
        instance = await self._load()
        try:
            self.api_keys, self.admin_keys = read_keys(self.settings)
        except SettingsError:
            await _close(instance)
            raise
        return instance

    async def _load(self) -> _Instance:
        bundle = await asyncio.to_thread(open_bundle, self.settings.bundle)
        in_service = self._current.attributor.batcher if self._current else None
        try:
            return _Instance(await Attributor(bundle, self.settings, in_service).__aenter__())
        except BaseException:
            bundle.close()
            raise

    def _announce(self, attributor: Attributor) -> None:
        attributor.announce()
        name, digest, provider = attributor.model.name, attributor.model.digest, attributor.engine.provider
        logger.info("serving bundle %s %s on %s", name, digest, provider)


def _ignore_error(reload: asyncio.Task[Reloaded]) -> None:
    """It was logged; asyncio would complain of it again if every caller has gone away."""
    if not reload.cancelled():
        reload.exception()


async def _retire(instance: _Instance) -> None:
    """Close a bundle after its last request."""
    while instance.users:
        instance.unused.clear()  # may be set from an earlier idle moment
        await instance.unused.wait()
    await _close(instance)


async def _close(instance: _Instance) -> None:
    await instance.attributor.__aexit__()
    instance.attributor.bundle.close()


def _not_ready() -> ServiceError:
    return ServiceError("not_ready", "no bundle is in service: the service is starting or stopping; see /readyz")


def read_keys(settings: Settings) -> tuple[Keys, Keys]:
    """(API keys, admin keys). Raises `SettingsError`."""
    return (
        Keys("api_keys", settings.api_keys, settings.api_keys_file),
        Keys("admin_keys", settings.admin_keys, settings.admin_keys_file),
    )
