"""The bundle: the one thing that passes from training to serving. An immutable directory, named by its content.

    manifest.json        everything below, and the sha256 and size of every other file
    vision.onnx, .data   pixels -> `models.account.ledger.Decomposition` (names and shapes: `VISION_OUTPUTS`)
    vision.int8.onnx, vision.fp16.onnx, each with .data: optional, faster variants of it (`models.graph.variants`)
    replacement.onnx, .data: optional, the replacement model with C_{i->j} (`models.graph.replacement`); what it shares
                         with vision.onnx it reads from that one's .data
    text.onnx, .data     `tokens` [N, context] -> `text_embedding` [N, D], unit
    tokenizer.json       Hugging Face `tokenizers`
    directions.npy       [L, F, d]: what one unit of a feature adds to the [CLS] residual, memory-mapped; the vision
                         graph reads the very same bytes as its external data, so the table is stored once
    attention.npy        [L, d + 1, D]: what attention's value channels and biases add to the embedding, for heat maps;
                         bundles older than these have none, and their graph no input `details`
    last_decoders.npy    optional, [(L - 1) F, d]: likewise, what a feature writes to the last MLP output
    fold.npy             [d + 1, D]: ln_post and projection as a matrix M [d, D] and a bias beta [D]
    cards/               optional: what features fire on, in words, numbers and pictures (`models.bundle.cards`)
    label_sets/          optional: NAME.json (`models.bundle.label_sets`) and NAME.npy, unit embeddings [N, D]
    MODEL_CARD.md        written from the manifest

(The first design had directions in embedding space, [L, F, D]. Residual space is what the exact effect of removing
a row needs, and with `fold.npy` it gives the contribution to any label just the same.)

No torch here: the service reads bundles with numpy and pydantic.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from vitrine.models.bundle.label_sets import LabelSetError, NamedLabels, read_label_set
from vitrine.models.bundle.model_card import model_card
from vitrine.models.errors import VitrineError

if TYPE_CHECKING:
    from vitrine.models.bundle.cards import Cards

FORMAT = 1
MANIFEST = "manifest.json"
REQUIRED = (
    "vision.onnx",
    "vision.onnx.data",
    "text.onnx",
    "text.onnx.data",
    "tokenizer.json",
    "directions.npy",
    "fold.npy",
    "MODEL_CARD.md",
)
CARDS = ("cards/features.parquet", "cards/images.parquet", "cards/references.npz")
# Outputs of vision.onnx for `pixels` [B, 3, H, W]; R = 2L + 3 rows, see `models.account.ledger`.
VISION_OUTPUTS = (
    "embedding",  # [B, D]
    "rows",  # [B, R, D]
    "sigma",  # [B]
    "sigma_without",  # [B, R]
    "norm",  # [B]
    "feature_indices",  # [B, L, k] int64
    "feature_values",  # [B, L, k] 0 in places not in use
    "projection",  # [B, L] summing to 1, or all 0
    "fidelity",  # [B, 2]: r2, cosine
)
# On request alone, where the input `details` is true (else B is 0): see `models.account.ledger.Details`.
DETAILS_INPUT = "details"  # [] bool
DETAILS = (
    "lens",  # [B, L, D]
    "attention_weights",  # [B, L, H, T]
    "attention_values",  # [B, L, T, d]
    "token_norms",  # [B, T]
)
# Inputs of replacement.onnx besides `pixels`, and its outputs.
REPLACED_INPUT = "replaced"  # [L, 2] bool: `models.account.windows.replaced`
REPLACEMENT_OUTPUTS = (
    "embedding",  # [B, D]
    "contributions",  # [B, 2, L, L]: C of [CLS] and in the mean over patches; by target, then by source
)

Variant = Literal["int8", "fp16"]
Precision = Literal["fp32", "int8", "fp16"]


def vision_file(precision: Precision) -> str:
    """The file of the vision graph in that precision."""
    return "vision.onnx" if precision == "fp32" else f"vision.{precision}.onnx"


class BundleError(VitrineError, ValueError):
    """A directory is no bundle that this version can serve; the message says which file and why."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClipIdentity(_Part):
    name: str
    weights: str
    sha256: str


class Preprocessing(_Part):
    """open_clip's evaluation transform: resize, centre crop, RGB in [0, 1], (x - mean) / std."""

    size: tuple[PositiveInt, PositiveInt]  # height, width
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: Literal["shortest", "squash"]

    @model_validator(mode="after")
    def _square(self) -> Preprocessing:
        if self.resize_mode == "shortest" and self.size[0] != self.size[1]:
            raise ValueError("resize_mode 'shortest' is supported for square sizes alone")
        return self


class Shape(_Part):
    layers: PositiveInt  # L
    width: PositiveInt  # d
    embedding: PositiveInt  # D
    features: PositiveInt  # F a layer
    k: PositiveInt  # places of a served code: so many features of a layer can be active on [CLS], not more
    # Budgets of the sparsifier, one a layer (jumprelu, batch_topk: means). None, as in bundles older than these
    # fields: k in every layer.
    k_cls: tuple[PositiveInt, ...] | None = None
    k_patches: tuple[PositiveInt, ...] | None = None
    cross_layer: bool = True  # False: a feature writes to the MLP output of its own layer alone
    tokens: PositiveInt  # [CLS] and patches

    @model_validator(mode="after")
    def _budget_a_layer(self) -> Shape:
        for name in ("k_cls", "k_patches"):
            budgets = getattr(self, name)
            if budgets is not None and len(budgets) != self.layers:
                raise ValueError(f"{name} has {len(budgets)} numbers for {self.layers} layers")
        return self


class Text(_Part):
    """How a label becomes an embedding."""

    context: PositiveInt
    pad: int  # token id that fills a text up to `context`
    labels: tuple[str, ...]  # default label set
    templates: tuple[str, ...]  # default templates, each with {}


class Data(_Part):
    name: str
    licence: str
    train_images: int
    val_images: int


class Metrics(_Part):
    """Measured on the val split; None: not measured. R^2 is the mean over layers."""

    r2: float | None = None
    cosine: float | None = None
    r2_cls: float | None = None
    dead_share: float | None = None
    zero_shot_top1: float | None = None
    replacement_all_top1: float | None = None
    replacement_cls_top1: float | None = None
    keep_top4_top1: float | None = None
    drop_top1_top1: float | None = None


class Agreement(_Part):
    """How far a variant of the vision graph agrees with the float32 one, on images that neither was trained on."""

    images: int
    top1: float  # share of images with the same top-1 among the default labels
    ledger_cosine: float  # of the two accounts of the top-1's logit, mean over images
    top_features: float  # share of the ten features that contribute most to it, mean over images

    @property
    def enough(self) -> bool:
        """Whether the variant may be written. Not if anything is no number."""
        return self.top1 >= 0.99 and self.ledger_cosine >= 0.99 and self.top_features >= 0.9


class LabelQuality(_Part):
    """Whether automatic labels tell the images on which their features fire, on images that chose nothing."""

    held_out_images: int
    labelled: int  # features
    measured: int  # of those, the ones that fire on enough of these images, and not on all
    auroc_share: float | None  # of the measured: AUROC of 0.8 or better
    auroc_share_shuffled: float | None  # the same with the labels dealt out at random among the labelled


class CardsSummary(_Part):
    """What the cards were made of, and how good their labels are."""

    data: str
    images: int  # that exemplars were chosen from
    vocabulary: int  # words
    features_cls: int  # features that are read at [CLS], the others at patches
    # By where features are read: what score, clarity and margin a label must reach; None: nothing was good enough.
    thresholds: dict[Literal["cls", "patches"], dict[str, float] | None]
    quality: LabelQuality
    pictures: Literal["thumbnails", "means", "none"]
    references: int  # images for retrieval


class FileEntry(_Part):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: int


class Manifest(_Part):
    format_version: int = FORMAT
    name: str
    description: str
    clip: ClipIdentity
    preprocessing: Preprocessing
    shape: Shape
    sparsifier: Literal["relu_topk", "abs_topk", "jumprelu", "batch_topk"]
    logit_scale: float
    text: Text
    precisions: tuple[Precision, ...] = ("fp32",)  # of the vision graph; all but fp32 in vision.<precision>.onnx
    agreement: dict[Variant, Agreement] = {}  # of each of those with fp32
    tables: Literal["float32", "float16"]  # precision of directions and of the CLT's weights in the graph
    data: Data
    recipe: str  # the recipe's text, as it was used
    metrics: Metrics
    licence: str
    cards: CardsSummary | None = None
    files: dict[str, FileEntry] = {}

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name:
                raise ValueError(f"file name {name!r} leaves the bundle")
        return files


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `open_bundle` makes one; nothing is read before it is asked for."""

    path: Path
    manifest: Manifest
    digest: str  # sha256:..., of manifest.json and so of everything

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
        """Whether there is a replacement.onnx."""
        return "replacement.onnx" in self.manifest.files

    @cached_property
    def cards(self) -> Cards | None:
        """The feature cards, if there are any. Raises `BundleError` if they cannot be used."""
        if self.manifest.cards is None:
            return None
        from vitrine.models.bundle.cards import Cards, CardsError  # DuckDB, which a bundle without cards does not need

        try:
            return Cards(self.path, self.manifest.shape.layers, self.manifest.shape.features)
        except CardsError as error:
            raise BundleError(str(error)) from error

    @cached_property
    def attention_fold(self) -> NDArray[np.floating] | None:
        """[L, d + 1, D] (`Tower.attention_fold`), memory-mapped; None in a bundle older than heat maps."""
        if "attention.npy" not in self.manifest.files:
            return None
        shape = self.manifest.shape
        return self._table("attention.npy", (shape.layers, shape.width + 1, shape.embedding))

    @cached_property
    def label_sets(self) -> dict[str, tuple[NamedLabels, NDArray[np.floating]]]:
        """Named label sets with their unit embeddings [N, D]. Raises `BundleError` for one that cannot be used."""
        found = {}
        for name in self.manifest.files:
            path = PurePosixPath(name)
            if path.parts[:-1] == ("label_sets",) and path.suffix == ".json":
                try:
                    labels = read_label_set(self.path / name)
                except LabelSetError as error:
                    raise BundleError(str(error)) from error
                shape = (len(labels.labels), self.manifest.shape.embedding)
                found[path.stem] = labels, np.array(self._table(f"label_sets/{path.stem}.npy", shape))
        return found

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
    """Read and check a bundle: manifest, version, and every file's presence, size and sha256.

    Raises `BundleError` naming the first thing that is wrong.
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
    """Write the model card and, last, the manifest over the files that lie in `path`; returns the opened bundle."""
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
    """manifest.json's bytes, after a look at the format version alone (other versions have other fields)."""
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
    """Of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
