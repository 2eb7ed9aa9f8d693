"""The end of making a bundle: model card and manifest."""

from __future__ import annotations

from pathlib import Path

from vitrine.models.bundle.bundle import Bundle, open_bundle
from vitrine.models.bundle.files import sha256_and_identity
from vitrine.models.bundle.layout import MANIFEST
from vitrine.models.bundle.manifest import FileEntry, Manifest
from vitrine.models.bundle.model_card import model_card


def seal(path: Path, manifest: Manifest) -> Bundle:
    """Write the model card and, last, the manifest of the files in `path`; return the opened bundle."""
    (path / "MODEL_CARD.md").write_text(model_card(manifest), encoding="utf-8")
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    files = {
        name: FileEntry(sha256=file_sha256(path / name), bytes=(path / name).stat().st_size)
        for name in names
        if name != MANIFEST
    }
    sealed = manifest.model_copy(update={"files": files})
    (path / MANIFEST).write_text(sealed.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return open_bundle(path)


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    return sha256_and_identity(file)[0]
