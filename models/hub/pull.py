"""A bundle from a hub: downloaded into the hub's own cache, copied beside its place, verified, then given its name.

The cache is what resumes: files that are there whole are not downloaded again. Nothing but what the manifest lists is
taken, and nothing of it counts before its sha256 is the manifest's.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars
from rich.console import Console

from vitrine.models.bundle.bundle import Bundle, open_bundle
from vitrine.models.bundle.files import BundleError
from vitrine.models.bundle.layout import MANIFEST
from vitrine.models.bundle.manifest import FileEntry
from vitrine.models.bundle.manifest_file import read_manifest
from vitrine.models.files.names import check_name
from vitrine.models.files.problems import naming
from vitrine.models.files.writing import move_folder, prepare_folder
from vitrine.models.hub.address import Address, HubError
from vitrine.models.hub.download import download
from vitrine.models.progress import Progress

AT_ONCE = 8  # files, as the hub's own client takes
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def pull(address: Address, out: Path, console: Console, digest: str | None = None) -> Bundle:
    """Download the bundle at `address` to the folder `out`, which appears when all of it is there and verified.

    Args:
        digest: sha256:... that the bundle must have; None: any, which the hub, and whoever may write there, decides.

    Raises `HubError`, `FileError`, and `BundleError` if it is none.
    """
    check_name(out)
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise HubError(
            f"{digest!r} is not a digest: give sha256: and 64 hexadecimal digits, as `vitrine verify` prints them"
        )
    if out.exists() or out.is_symlink():
        raise HubError(f"{out} already exists, and a bundle is never changed; choose another place")
    prepare_folder(out.parent)
    disable_progress_bars()  # ours is told below
    snapshot = _download(address, MANIFEST).parent
    commit = snapshot.name  # so that all files are of one commit, whatever is pushed meanwhile
    with _named(snapshot, address):
        manifest, found = read_manifest(snapshot)
    if digest not in (None, found):
        raise HubError(f"{address} is not the requested bundle: its digest is {found}, not {digest}")
    pinned = Address(address.repository, commit)
    _check_room(pinned, manifest.files, out.parent)
    files = _download_all(pinned, manifest.files, console)
    with naming(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle-") as scratch:
        partial = Path(scratch).resolve() / "bundle"
        for name, file in {MANIFEST: snapshot / MANIFEST, **files}.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, partial / name)
        with _named(partial, address, f"; the copy in {snapshot} is damaged, too: delete it, and pull again"):
            bundle = open_bundle(partial)
        if bundle.digest != found:
            raise HubError(f"{snapshot / MANIFEST} was changed in the meantime; pull again")
        move_folder(partial, out, last=MANIFEST)
    return replace(bundle, path=out.resolve())


def _download(address: Address, name: str) -> Path:
    """One file, in the cache; from the cache if it is there. Raises `HubError`, `FileError`."""
    try:
        return download(address, name)
    except RemoteEntryNotFoundError as error:
        if name == MANIFEST:
            raise HubError(f"{address} is not a bundle: it has no {MANIFEST}") from error
        raise HubError(f"{address} has no {name}, which its {MANIFEST} lists; its owner must push it") from error


def _download_all(address: Address, entries: Mapping[str, FileEntry], console: Console) -> dict[str, Path]:
    """Every file, in the cache. Raises `HubError` for the first, as the manifest lists them, that is not to be had."""
    files = {}
    with Progress(console) as progress, ThreadPoolExecutor(AT_ONCE) as pool:
        task = progress.task("download", sum(entry.bytes for entry in entries.values()), "bytes")
        found = pool.map(lambda name: _download(address, name), entries)
        for (name, entry), file in zip(entries.items(), found, strict=True):
            files[name] = file
            task.advance(entry.bytes)
    return files


def _check_room(address: Address, entries: Mapping[str, FileEntry], folder: Path) -> None:
    """Raise `HubError` unless cache and `folder` have room: before the download rather than at the end of it."""
    cache, total = Path(constants.HF_HUB_CACHE), sum(entry.bytes for entry in entries.values())
    missing = sum(
        entry.bytes
        for name, entry in entries.items()
        if not isinstance(try_to_load_from_cache(address.repository, name, revision=address.revision), str)
    )
    with naming(folder):
        wanted = {folder: total}
        if missing and cache.stat().st_dev == folder.stat().st_dev:
            wanted = {folder: total + missing}
        elif missing:
            wanted = {cache: missing, folder: total}
        for place, needed in wanted.items():
            free = shutil.disk_usage(place).free
            if free < needed:
                raise HubError(
                    f"{place} has too little space: {address} needs {needed / 1e6:,.1f} MB there, but only "
                    f"{free / 1e6:,.1f} MB are free; free some space (the cache, HF_HUB_CACHE, is {cache})"
                )


@contextmanager
def _named(folder: Path, address: Address, remedy: str = "") -> Iterator[None]:
    """For a block that reads a bundle in a folder of ours: what is wrong with it as an error about the address."""
    try:
        yield
    except BundleError as error:
        raise BundleError(f"{str(error).replace(str(folder), str(address))}{remedy}") from error
