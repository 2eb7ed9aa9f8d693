"""manifest.json: what a bundle is made of, what it was measured to do, and the sha256 of every file."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from vitrine.models.bundle.layout import Precision, Variant

FORMAT = 1


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
