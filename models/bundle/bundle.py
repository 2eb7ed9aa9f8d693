"""The bundle: the only artifact passed from training to serving. An immutable directory, identified by its digest.

    manifest.json        `models.bundle.manifest`; lists the sha256 and size of every other file
    vision.onnx, .data   pixels -> `models.account.ledger.Decomposition` (names and shapes: `models.bundle.layout`)
    vision.int8.onnx, vision.fp16.onnx, each with .data: optional, faster variants (`models.graph.variants`)
    replacement.onnx, .data: optional, the replacement model with C_{i->j} (`models.graph.replacement`); tensors shared
                         with vision.onnx are read from vision.onnx.data
    text.onnx, .data     `tokens` [N, T] -> `text_embedding` [N, D], unit; T: any length of text, or (in older bundles,
                         and for towers that attend to the padding) the context alone
    tokenizer.json       Hugging Face `tokenizers`
    directions.npy       [L, F, d]: what one unit of a feature adds to the [CLS] residual, memory-mapped; the vision
                         graph reads the same file as its external data, so the table is stored once
    attention.npy        [L, d + 1, D]: what attention's value channels and biases add to the embedding, for heat maps;
                         older bundles lack it, and their graph has no input `details`
    last_decoders.npy    optional, [(L - 1) F, d], shared in the same way: what a feature writes to the last MLP output
    fold.npy             [d + 1, D]: ln_post and projection as a matrix M [d, D] and a bias beta [D]
    cards/               optional: what features fire on, as labels, numbers and images (`models.bundle.cards`)
    label_sets/          optional: NAME.json (`models.bundle.label_sets`) and NAME.npy, unit embeddings [N, D]
    MODEL_CARD.md        generated from the manifest

(The first design had directions in embedding space, [L, F, D]. The exact effect of removing a row needs residual
space, and together with `fold.npy` it also gives the contribution to any label.)

No torch here: the service reads bundles with numpy and pydantic.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from vitrine.models.bundle.label_sets import LabelSetError, NamedLabels, read_label_set
from vitrine.models.bundle.layout import CARDS, MANIFEST, REQUIRED, vision_file
from vitrine.models.bundle.manifest import FORMAT, FileEntry, Manifest
from vitrine.models.bundle.model_card import model_card
from vitrine.models.errors import VitrineError

if TYPE_CHECKING:
    from vitrine.models.bundle.cards import Cards


class BundleError(VitrineError, ValueError):
    """A directory is not a bundle that this version can serve; the message says which file and why."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, created by `open_bundle`. Tables are read on first use."""

    path: Path
    manifest: Manifest
    digest: str  # sha256:... of manifest.json, and so of the whole bundle

    @cached_property
    def directions(self) -> NDArray[np.floating]:
        """[L, F, d], memory-mapped."""
        shape = self.manifest.shape
        return self._table("directions.npy", (shape.layers, shape.features, shape.width))

    @cached_property
    def _folded(self) -> NDArray[np.floating]:
        return np.array(self._table("fold.npy", (self.manifest.shape.width + 1, self.manifest.shape.embedding)))

    def _table(self, name: str, shape: tuple[int, ...]) -> NDArray[np.floating]:
        """A .npy file, memory-mapped. Raises `BundleError` unless it holds floats of this shape."""
        try:
            table = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BundleError(f"{self.path / name} cannot be used: {error}") from error
        if table.shape != shape or not np.issubdtype(table.dtype, np.floating):
            raise BundleError(f"{self.path / name} is {table.dtype} {table.shape}, the manifest says {shape}")
        return table

    @property
    def has_replacement(self) -> bool:
        """Whether the bundle has a replacement.onnx."""
        return "replacement.onnx" in self.manifest.files

    @cached_property
    def cards(self) -> Cards | None:
        """The feature cards, or None if the bundle has none. Raises `BundleError` if they cannot be used."""
        if self.manifest.cards is None:
            return None
        from vitrine.models.bundle.cards import Cards, CardsError  # imports DuckDB, not needed without cards

        try:
            return Cards(self.path, self.manifest.shape.layers, self.manifest.shape.features)
        except CardsError as error:
            raise BundleError(str(error)) from error

    @cached_property
    def attention_fold(self) -> NDArray[np.floating] | None:
        """[L, d + 1, D] (`Tower.attention_fold`), memory-mapped; None in a bundle from before heat maps."""
        if "attention.npy" not in self.manifest.files:
            return None
        shape = self.manifest.shape
        return self._table("attention.npy", (shape.layers, shape.width + 1, shape.embedding))

    @cached_property
    def label_sets(self) -> dict[str, tuple[NamedLabels, NDArray[np.floating]]]:
        """Named label sets with their unit embeddings [N, D]. Raises `BundleError` if one cannot be used."""
        label_sets = {}
        for name in self.manifest.files:
            path = PurePosixPath(name)
            if path.parts[:-1] == ("label_sets",) and path.suffix == ".json":
                try:
                    labels = read_label_set(self.path / name)
                except LabelSetError as error:
                    raise BundleError(str(error)) from error
                shape = (len(labels.labels), self.manifest.shape.embedding)
                label_sets[path.stem] = labels, np.array(self._table(f"label_sets/{path.stem}.npy", shape))
        return label_sets

    @property
    def fold(self) -> NDArray[np.floating]:
        """M [d, D]."""
        return self._folded[:-1]

    @property
    def beta(self) -> NDArray[np.floating]:
        """ln_post's bias in embedding space [D]."""
        return self._folded[-1]

    def __hash__(self) -> int:
        return hash(self.digest)


def open_bundle(path: Path) -> Bundle:
    """Read and check a bundle: manifest, version, and the presence, size and sha256 of every file.

    Raises `BundleError` naming the first problem.
    """
    raw = _read_manifest(path)
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise BundleError(f"{path / MANIFEST}: {problems}") from error
    variants = [vision_file(precision) for precision in manifest.precisions]
    cards = CARDS if manifest.cards else ()
    required = dict.fromkeys([*REQUIRED, *variants, *(f"{name}.data" for name in variants), *cards])
    if missing := [name for name in required if name not in manifest.files]:
        raise BundleError(f"{path / MANIFEST} does not list {', '.join(missing)}")
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise BundleError(f"{file} is missing")
        if (size := file.stat().st_size) != entry.bytes:
            raise BundleError(f"{file} has {size:,} bytes, the manifest says {entry.bytes:,}")
        if file_sha256(file) != entry.sha256:
            raise BundleError(f"{file} does not have the manifest's sha256: it was changed or damaged")
    return Bundle(path, manifest, "sha256:" + hashlib.sha256(raw).hexdigest())


def seal(path: Path, manifest: Manifest) -> Bundle:
    """Write the model card and, last, the manifest of the files in `path`; return the opened bundle."""
    (path / "MODEL_CARD.md").write_text(model_card(manifest))
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    files = {
        name: FileEntry(sha256=file_sha256(path / name), bytes=(path / name).stat().st_size)
        for name in names
        if name != MANIFEST
    }
    sealed = manifest.model_copy(update={"files": files})
    (path / MANIFEST).write_text(sealed.model_dump_json(indent=2) + "\n")
    return open_bundle(path)


def _read_manifest(path: Path) -> bytes:
    """The bytes of manifest.json. Only the format version is checked here: other versions have other fields."""
    if not path.is_dir():
        raise BundleError(f"{path} is no directory")
    try:
        raw = (path / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise BundleError(f"{path / MANIFEST} is missing: {path} is no bundle") from error
    except OSError as error:
        raise BundleError(f"{path / MANIFEST} cannot be read: {error}") from error
    try:
        version = _Version.model_validate_json(raw).format_version
    except ValidationError as error:
        raise BundleError(f"{path / MANIFEST} is not a JSON object with a format_version") from error
    if version != FORMAT:
        raise BundleError(f"{path} has bundle format {version}; this version of Vitrine reads format {FORMAT}")
    return raw


class _Version(BaseModel):
    format_version: int


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
