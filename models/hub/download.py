"""One file of a repository, downloaded into the hub's own cache, or one sentence that says why not."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, hf_hub_download

from vitrine.models.files.problems import naming
from vitrine.models.hub.address import Address, HubError, hub_errors


def download(address: Address, name: str) -> Path:
    """The file in the cache; from the cache if it is there.

    Raises `HubError`, `FileError`, and huggingface_hub's `RemoteEntryNotFoundError` if the repository has no such file.
    """
    try:
        with naming(Path(constants.HF_HUB_CACHE)), hub_errors(address):
            return Path(hf_hub_download(address.repository, name, revision=address.revision))
    except RuntimeError as error:  # hf_xet's, whatever goes wrong on its way
        why = next(iter(str(error).splitlines()), "")[:200]
        raise HubError(
            f"{address}: {name} cannot be downloaded ({why}); try again, or set HF_HUB_DISABLE_XET=1"
        ) from error
