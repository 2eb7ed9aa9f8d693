"""The bundle: the only artifact passed from training to serving. An immutable directory, identified by its digest.

    manifest.json        `models.bundle.manifest`; lists the sha256 and size of every other file
    vision.onnx, .data   pixels -> `models.account.ledger.Decomposition` (names and shapes: `models.bundle.layout`)
    vision.int8.onnx, vision.fp16.onnx, each with .data: optional, faster variants (`models.graph.variants`)
    replacement.onnx, .data: optional, the replacement model with C_{i->j} (`models.graph.replacement`); tensors shared
                         with vision.onnx are read from vision.onnx.data
    trace.onnx, sources.onnx, their .data: optional, source accounts (`models.account.sources`); tensors of the graphs
                         above are read from theirs
    scores.onnx          optional, with tensors of those: accounts of attention (`models.account.attention_score`)
    rerun.onnx           optional, with tensors of those: the network with interventions in it (`models.graph.rerun`)
    baseline_activations.npy, baseline_written.npy, baseline_stream.npy: optional, the average picture, for source
                         accounts about it and interventions that put it in
    residual_rerun.onnx, residual_encoder_0.npy, residual_decoder_0.npy and on, residual_activations.npy: optional,
                         interventions in features of residual SAEs, what they read and write, their mean activations
    residual_trace.onnx, residual_block_0.onnx and on, their .data: optional, residual SAEs: accounts and circuits by
                         features of the stream (`models.account.residual`), from the trace back block by block;
                         tensors of the graphs above are read from theirs, so they cannot lie in a folder of their own
    text.onnx, .data     `tokens` [N, T] -> `text_embedding` [N, D], unit; T: any length of text, or (in older bundles,
                         and for towers that attend to the padding) the context alone
    tokenizer.json       Hugging Face `tokenizers`, for texts cleaned as the manifest says (`models.texts`)
    directions.npy       with a CLT, [L, F, d]: what one unit of a feature adds to the [CLS] residual, memory-mapped;
                         the vision graph reads the same file as its external data, so the table is stored once
    attention.npy        [L, d + 1, D]: what attention's value channels and biases add to the embedding, for heat maps;
                         older bundles lack it, and their graph has no input `details`
    encoders.npy         with a CLT, [L, F, d]: what features read, shared in the same way; older bundles lack it
    last_decoders.npy    optional, [(L - 1) F, d], shared in the same way: what a feature writes to the last MLP output
    fold.npy             [d + 1, D]: ln_post and projection as a matrix M [d, D] and a bias beta [D]
    cards/               optional: what features fire on, as labels, numbers and images (`models.bundle.cards`)
    residual_cards/      optional, with residual SAEs: the same of their features
    edits/               optional: NAME.json, interventions that are kept (`models.interventions.edit`)
    label_sets/          optional: NAME.json (`models.bundle.label_sets`) and NAME.npy, unit embeddings [N, D]
    MODEL_CARD.md        generated from the manifest

Without a CLT (`Manifest.has_features`) accounts have the MLPs' rows in the place of the features'.

(The first design had directions in embedding space, [L, F, D]. The exact effect of removing a row needs residual
space, and together with `fold.npy` it also gives the contribution to any label.)

No torch here: the service reads bundles with numpy and pydantic.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vitrine.models.bundle.files import BundleError as BundleError
from vitrine.models.bundle.files import Identity, map_table, sha256_and_identity
from vitrine.models.bundle.label_sets import LabelSetError, NamedLabels, parse_label_set
from vitrine.models.bundle.layout import (
    BASELINE,
    CARD_FILES,
    CARDS,
    ENCODERS,
    MANIFEST,
    READ_BY_GRAPHS,
    REQUIRED,
    REQUIRED_WITH_FEATURES,
    RERUN,
    RESIDUAL_RERUN,
    RESIDUAL_TRACE,
    Dictionary,
    residual_file,
    vision_file,
)
from vitrine.models.bundle.manifest import FileEntry, Manifest
from vitrine.models.bundle.manifest_file import read_manifest
from vitrine.models.files.names import check_name
from vitrine.models.files.reading import open_regular

if TYPE_CHECKING:
    from vitrine.models.bundle.cards import Cards


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, created by `open_bundle`. Tables are read on first use, from the files that were verified."""

    path: Path  # without symbolic links
    manifest: Manifest
    digest: str  # sha256:... of manifest.json, and so of the whole bundle
    # Of the files as they were verified; empty for a bundle that this process has just written.
    identities: Mapping[str, Identity] = field(default_factory=dict, compare=False, repr=False)

    def open(self, name: str) -> BinaryIO:
        """One of the files that were verified. Raises `BundleError` if the path names another file by now."""
        file = self.path / name
        if self.identities and name not in self.identities:
            raise BundleError(f"{self.path / MANIFEST} does not list {name}")
        try:
            stream = open_regular(file)
        except OSError as error:
            raise BundleError(f"{file} cannot be read: {error}") from error
        if self.identities and Identity.of(os.fstat(stream.fileno())) != self.identities[name]:
            stream.close()
            raise self._changed(name)
        return stream

    def check_unchanged(self) -> None:
        """Raise `BundleError` if one of the paths names another file than the one verified, or if it was written to.

        For what is opened by its path, as ONNX Runtime does: to be called once it is open.
        """
        for name, identity in self.identities.items():
            try:
                current = Identity.of((self.path / name).stat())
            except OSError as error:
                raise self._changed(name) from error
            if current != identity:
                raise self._changed(name)

    def _changed(self, name: str) -> BundleError:
        return BundleError(f"{self.path / name} has changed since it was verified; load the bundle again")

    def close(self) -> None:
        """Close what is held open for the cards; they cannot be read any more."""
        for name in CARDS.values():
            if (cards := vars(self).get(name)) is not None:
                cards.close()

    @cached_property
    def directions(self) -> NDArray[np.floating]:
        """[L, F, d], memory-mapped; F is 0 without a CLT."""
        shape = self.manifest.shape
        if not self.manifest.has_features:
            return np.zeros((shape.layers, 0, shape.width), np.float32)
        return self.table("directions.npy", (shape.layers, shape.features, shape.width))

    @cached_property
    def _folded(self) -> NDArray[np.floating]:
        return np.array(self.table("fold.npy", (self.manifest.shape.width + 1, self.manifest.shape.embedding)))

    def table(self, name: str, shape: tuple[int, ...]) -> NDArray[np.floating]:
        """One of its .npy files, memory-mapped. Raises `BundleError` unless it holds finite floats of this shape."""
        with self.open(name) as stream:
            try:
                return map_table(stream, shape)
            except (OSError, ValueError) as error:
                raise BundleError(f"{self.path / name} cannot be used: {error}") from error

    @property
    def has_replacement(self) -> bool:
        """Whether the bundle has a replacement.onnx."""
        return "replacement.onnx" in self.manifest.files

    @property
    def has_sources(self) -> bool:
        """Whether the bundle has the graphs of source accounts."""
        return "sources.onnx" in self.manifest.files

    @property
    def has_scores(self) -> bool:
        """Whether the bundle has the graph of attention scores."""
        return self.has_sources and "scores.onnx" in self.manifest.files

    @property
    def has_rerun(self) -> bool:
        """Whether the bundle has the graph of interventions in the running network."""
        return RERUN in self.manifest.files

    @property
    def has_residual_rerun(self) -> bool:
        """Whether the bundle has the graph of interventions in features of residual SAEs."""
        return self.has_residual and RESIDUAL_RERUN in self.manifest.files

    @property
    def has_residual(self) -> bool:
        """Whether the bundle has residual SAEs."""
        return self.manifest.residual is not None

    @cached_property
    def baseline(self) -> tuple[NDArray[np.floating], NDArray[np.floating]] | None:
        """The fields of `models.account.sources.Baseline`: [L, 2, F], [L, L, 2, d]; None if the bundle has none."""
        if not set(BASELINE) <= self.manifest.files.keys():
            return None
        shape = self.manifest.shape
        activations, written = BASELINE
        layers = shape.layers
        return (
            np.array(self.table(activations, (layers, 2, shape.features))),
            np.array(self.table(written, (layers, layers, 2, shape.width))),
        )

    @cached_property
    def encoders(self) -> NDArray[np.floating] | None:
        """[L, F, d] what features read, memory-mapped; None in bundles of older versions and without a CLT."""
        if ENCODERS not in self.manifest.files:
            return None
        shape = self.manifest.shape
        return self.table(ENCODERS, (shape.layers, shape.features, shape.width))

    @cached_property
    def cards(self) -> Cards | None:
        """The cards of the CLT's features, or None if the bundle has none. Raises `BundleError` if they cannot be
        used."""
        return self._open_cards("clt")

    @cached_property
    def residual_cards(self) -> Cards | None:
        """The same of the residual SAEs' features."""
        return self._open_cards("residual")

    def cards_of(self, dictionary: Dictionary) -> Cards | None:
        """One of the two above."""
        return self.cards if dictionary == "clt" else self.residual_cards

    def _open_cards(self, dictionary: Dictionary) -> Cards | None:
        if self.manifest.cards_of(dictionary) is None:
            return None
        from vitrine.models.bundle.cards import Cards, CardsError  # imports DuckDB, not needed without cards

        try:
            return Cards(self.path, self.manifest.features_of(dictionary), CARDS[dictionary], self.open)
        except CardsError as error:
            raise BundleError(str(error)) from error

    @cached_property
    def attention_fold(self) -> NDArray[np.floating] | None:
        """[L, d + 1, D] (`Tower.attention_fold`), memory-mapped; None in a bundle from before heat maps."""
        if "attention.npy" not in self.manifest.files:
            return None
        shape = self.manifest.shape
        return self.table("attention.npy", (shape.layers, shape.width + 1, shape.embedding))

    @cached_property
    def label_sets(self) -> dict[str, tuple[NamedLabels, NDArray[np.floating]]]:
        """Named label sets with their unit embeddings [N, D]. Raises `BundleError` if one cannot be used."""
        label_sets = {}
        for name in self.manifest.files:
            path = PurePosixPath(name)
            if path.parts[:-1] == ("label_sets",) and path.suffix == ".json":
                try:
                    with self.open(name) as stream:
                        labels = parse_label_set(self.path / name, stream)
                except (LabelSetError, OSError) as error:
                    raise BundleError(str(error)) from error
                shape = (len(labels.labels), self.manifest.shape.embedding)
                label_sets[path.stem] = labels, np.array(self.table(f"label_sets/{path.stem}.npy", shape))
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

    Symbolic links in `path` are followed once, here: whatever is read later comes from the directory that was
    verified. Raises `BundleError` naming the first problem, `FileError` for a name that is no UTF-8.
    """
    try:
        path = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a NUL in the name
        raise BundleError(f"{path} cannot be opened: {error}") from error
    check_name(path)
    manifest, digest = read_manifest(path)
    variants = [vision_file(precision) for precision in manifest.precisions]
    cards = [f"{CARDS[one]}/{name}" for one in CARDS if manifest.cards_of(one) for name in CARD_FILES]
    saes = [RESIDUAL_TRACE, *map(residual_file, range(manifest.shape.layers))] if manifest.residual else []
    tables = REQUIRED_WITH_FEATURES if manifest.has_features else ()
    required = dict.fromkeys([*REQUIRED, *tables, *variants, *(f"{name}.data" for name in variants), *cards, *saes])
    if missing := [name for name in required if name not in manifest.files]:
        raise BundleError(f"{path / MANIFEST} does not list {', '.join(missing)}")
    identities = {name: _verify(path / name, entry) for name, entry in manifest.files.items()}
    _refuse_unlisted(path, manifest)
    return Bundle(path, manifest, digest, identities)


def _verify(file: Path, entry: FileEntry) -> Identity:
    """The identity of a file that is as its entry says. Raises `BundleError`."""
    try:
        if not file.is_file():
            raise BundleError(f"{file} is missing")
        if (size := file.stat().st_size) != entry.bytes:
            raise BundleError(f"{file} has {size:,} bytes, but the manifest says {entry.bytes:,}")
        sha256, identity = sha256_and_identity(file)
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error}") from error
    if sha256 != entry.sha256:
        raise BundleError(f"{file} does not have the sha256 of the manifest: it was changed or is damaged")
    return identity


def _refuse_unlisted(path: Path, manifest: Manifest) -> None:
    """Raise `BundleError` for tensors beside the graphs that nobody has verified: a graph may name them as its own."""
    try:
        names = sorted(file.name for file in path.iterdir() if file.suffix in READ_BY_GRAPHS)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    if unlisted := [name for name in names if name not in manifest.files]:
        raise BundleError(f"{path / MANIFEST} does not list {', '.join(unlisted)}, which is next to it")
