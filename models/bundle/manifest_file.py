"""manifest.json as it is read: its size, its version, its fields, and its digest, which is the whole bundle's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ValidationError

from vitrine.models.bundle.files import BundleError
from vitrine.models.bundle.layout import MANIFEST
from vitrine.models.bundle.manifest import FORMAT, Manifest
from vitrine.models.files.reading import open_regular

MAX_MANIFEST_BYTES = 2**26
SHOWN_PROBLEMS = 5  # of a manifest


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """The manifest in a directory, and its digest, sha256:... Nothing else there is looked at. Raises `BundleError`."""
    raw = _read(path)
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise BundleError(f"{path / MANIFEST}: {_problems(error)}") from error
    return manifest, "sha256:" + hashlib.sha256(raw).hexdigest()


def _problems(error: ValidationError) -> str:
    """Field and problem, of the first few."""
    problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    more = [f"and {len(problems) - SHOWN_PROBLEMS:,} more"] if len(problems) > SHOWN_PROBLEMS else []
    return "; ".join(problems[:SHOWN_PROBLEMS] + more)


def _read(path: Path) -> bytes:
    """The bytes of manifest.json. Only the format version is checked here: other versions have other fields."""
    try:
        if not path.is_dir():
            raise BundleError(f"{path} is not a directory")
        with open_regular(path / MANIFEST) as stream:
            raw = stream.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise BundleError(f"{path / MANIFEST} is missing: {path} is not a bundle") from error
    except OSError as error:
        raise BundleError(f"{path / MANIFEST} cannot be read: {error}") from error
    if len(raw) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path / MANIFEST} is larger than {MAX_MANIFEST_BYTES:,} bytes, too large for a manifest")
    try:
        version = _Version.model_validate_json(raw).format_version
    except ValidationError as error:
        raise BundleError(f"{path / MANIFEST} is not a JSON object with a format_version") from error
    if version != FORMAT:
        raise BundleError(f"{path} has bundle format {version}; this version of Vitrine reads format {FORMAT}")
    return raw


class _Version(BaseModel):
    format_version: int
