"""Where a bundle is on a hub, and what the hub answers, as one sentence.

The hub's own variables hold: HF_ENDPOINT (another hub), HF_TOKEN, HF_HOME and HF_HUB_CACHE (the cache), HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from vitrine.models.errors import VitrineError

PREFIX = "hf-hub:"
_REVISION = re.compile(r"[\w.+-]+(/[\w.+-]+)*")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class HubError(VitrineError):
    """A bundle cannot be taken from a hub or given to it; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Address:
    """A repository of models on a hub, and a branch, tag or commit of it."""

    repository: str  # org/name
    revision: str | None = None  # None: the main branch

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def parse_address(text: str) -> Address:
    """hf-hub:org/name or hf-hub:org/name@revision. Raises `HubError`."""
    repository, at, revision = text.removeprefix(PREFIX).partition("@")
    try:
        validate_repo_id(repository)
        is_named = repository.count("/") == 1
    except HFValidationError:
        is_named = False
    if not text.startswith(PREFIX) or not is_named:
        raise HubError(
            f"{text!r} is not the address of a repository: write {PREFIX}org/name or {PREFIX}org/name@revision"
        )
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise HubError(f"{text!r}: {revision!r} is not a branch, tag or commit")
    return Address(repository, revision or None)


@contextmanager
def hub_errors(address: Address) -> Iterator[None]:
    """For a block that asks the hub about `address`: what it answers, or does not, as `HubError`.

    That one file is not there (`RemoteEntryNotFoundError`) is for the block itself to say.
    """
    try:
        yield
    except GatedRepoError as error:
        raise HubError(f"{address} is gated: ask its owner for access on the hub, then {_LOG_IN}") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{address}: the hub has no such repository, or you have no access to it; check its name, or {_LOG_IN}"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{address}: the repository has no such branch, tag or commit") from error
    except LocalEntryNotFoundError as error:
        if constants.is_offline_mode():
            raise HubError(
                f"{address} is missing or incomplete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE "
                f"forbids downloads; unset it, or copy a cache that has it"
            ) from error
        raise HubError(_unreachable(address, error.__cause__ or error)) from error
    except RemoteEntryNotFoundError:
        raise
    except (httpx2.HTTPError, ConnectionError) as error:
        raise HubError(_unreachable(address, error)) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise HubError(_unreachable(address, error)) from error  # the hub's own: a download that is not whole


def _unreachable(address: Address, error: BaseException) -> str:
    """What did not work, in a sentence. (`HfHubHTTPError` has several lines, of which the status says enough.)"""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        remedy = f"; {_LOG_IN}, and check that you have permission" if status in (401, 403) else ""
        return f"{address}: {constants.ENDPOINT} answers {status} {error.response.reason_phrase}{remedy}"
    why = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"{address}: {constants.ENDPOINT} cannot be reached: {why}; check the network, then try again"
