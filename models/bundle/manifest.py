"""manifest.json: what a bundle was made from, its measured quality, and the sha256 of every file."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vitrine.models.bundle.label_sets import Labels, Templates
from vitrine.models.bundle.layout import READ_BY_GRAPHS, RESIDUAL, Dictionary, Precision, Variant
from vitrine.models.texts.clean import Clean

FORMAT = 1
# Far more than any model has; what is larger is a mistake, and would only be noticed when there is no memory for it.
_Side = Annotated[int, Field(gt=0, le=16_384)]  # pixels
_Layers = Annotated[int, Field(gt=0, le=1_024)]
_Width = Annotated[int, Field(gt=0, le=65_536)]
_Count = Annotated[int, Field(gt=0, le=2**24)]  # of features, of tokens
_Some = Annotated[int, Field(ge=0, le=2**24)]  # or none
_Mean = Annotated[float, Field(ge=-1e3, le=1e3)]
_Deviation = Annotated[float, Field(ge=1e-3, le=1e3)]  # below, one of 256 shades is more than a whole deviation
# Logits are float32: beyond 10,000 a ledger's remainder is no longer below 1e-3, much later they overflow.
_LogitScale = Annotated[float, Field(ge=1e-3, le=1e4)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClipIdentity(_Part):
    name: str
    weights: str
    sha256: str


class Preprocessing(_Part):
    """open_clip's evaluation transform: resize, centre crop, RGB in [0, 1], (x - mean) / std."""

    size: tuple[_Side, _Side]  # height, width
    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Deviation, _Deviation, _Deviation]
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: Literal["shortest", "squash"]

    @model_validator(mode="after")
    def _square(self) -> Preprocessing:
        if self.resize_mode == "shortest" and self.size[0] != self.size[1]:
            raise ValueError("resize_mode 'shortest' is supported only for square sizes")
        return self


def patch_grid(preprocessing: Preprocessing, patches: int) -> tuple[int, int]:
    """Rows and columns of the patches in the model's input."""
    height, width = preprocessing.size
    rows = max(1, round((patches * height / width) ** 0.5))  # patches are square
    return rows, patches // rows


class Shape(_Part):
    layers: _Layers  # L
    width: _Width  # d
    embedding: _Width  # D
    features: _Some  # F, per layer; 0: the bundle has no CLT
    k: _Some  # places of a served code: the most features per layer that can be active on [CLS]; 0 without a CLT
    # Budgets of the sparsifier, one per layer (jumprelu, batch_topk: means). None, as in bundles from before these
    # fields: k in every layer.
    k_cls: tuple[_Count, ...] | None = None
    k_patches: tuple[_Count, ...] | None = None
    cross_layer: bool = True  # False: a feature writes only to the MLP output of its own layer
    tokens: _Count  # [CLS] and patches
    heads: _Count | None = None  # H, of each layer's attention; None in bundles of older versions

    @model_validator(mode="after")
    def _one_budget_per_layer(self) -> Shape:
        if bool(self.features) != bool(self.k):
            raise ValueError(f"features is {self.features}, k is {self.k}: without a CLT both must be 0")
        for name in ("k_cls", "k_patches"):
            budgets = getattr(self, name)
            if budgets is not None and len(budgets) != self.layers:
                raise ValueError(f"{name} has {len(budgets)} numbers for {self.layers} layers")
        return self


FIT_IMAGES, FIT_SHARE = 100, 0.01  # the fewest images for it, and the share of them below `low_cosine`


class LabelFit(_Part):
    """How well the best of the default labels fits the images that the bundle was checked on."""

    images: Annotated[int, Field(ge=FIT_IMAGES)]
    low_cosine: Annotated[float, Field(ge=-1, le=1)]  # of image and best label; `FIT_SHARE` of the images are below it


class Text(_Part):
    """How labels are embedded."""

    context: _Width
    pad: Annotated[int, Field(ge=0, lt=2**31)]  # token id that pads a text to `context`
    labels: Labels  # default label set
    templates: Templates  # default templates, each with {}
    # What `models.texts` does besides tokenizer.json. In bundles of older versions, which have none of these fields,
    # tokenizer.json also cleans the texts, and not all of them as open_clip does.
    clean: Clean | None = None
    written: tuple[str, ...] = ()  # special tokens that a text may contain
    zeroed: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # token that open_clip replaces by 0
    fit: LabelFit | None = None  # None: there were too few images to measure it, or the bundle is of an older version


class Data(_Part):
    name: str
    licence: str
    train_images: int
    val_images: int


class LayerMetrics(_Part):
    """How well the CLT matches the MLPs at tokens of one type, layer by layer; `training.evaluation.reconstruction`
    has the definitions."""

    r2: tuple[float, ...]
    r2_kept: tuple[float | None, ...]  # None: fewer than two tokens are kept
    relative_error: tuple[float, ...]
    cosine: tuple[float, ...]
    outliers: tuple[float, ...]


class Metrics(_Part):
    """Measured on the val split; None: not measured. Without `_worst` and of a layer: the mean over layers.

    Outliers are tokens whose MLP output is longer than three times the median of its layer; `kept` are the others.
    """

    r2: float | None = None
    r2_worst: float | None = None  # the lowest of any layer
    r2_kept: float | None = None
    r2_kept_worst: float | None = None
    cosine: float | None = None
    relative_error: float | None = None  # median over tokens of |y - y'| / |y|
    outliers: float | None = None  # share of tokens
    r2_cls: float | None = None
    r2_cls_worst: float | None = None
    relative_error_cls: float | None = None
    dead_share: float | None = None
    zero_shot_top1: float | None = None
    replacement_all_top1: float | None = None
    replacement_all_agreement: float | None = None  # share of images with CLIP's own top-1
    replacement_cls_top1: float | None = None
    replacement_cls_agreement: float | None = None
    keep_top4_top1: float | None = None
    drop_top1_top1: float | None = None
    layers: dict[Literal["all", "cls", "patches"], LayerMetrics] = {}


TOP1, LEDGER_COSINE, TOP_FEATURES = 0.99, 0.99, 0.9  # the least that a variant must agree in


class Agreement(_Part):
    """How well a variant of the vision graph agrees with the float32 graph, on images that neither was trained on."""

    model_config = ConfigDict(allow_inf_nan=True)  # a variant that fails altogether, which is never written

    images: int
    top1: float  # share of images with the same top-1 among the default labels
    ledger_cosine: float  # between the two accounts of the top-1 logit, mean over images
    # Share of the ten largest feature contributions that agree, mean over images; None: the bundle has no CLT.
    top_features: float | None
    # Where and how it was exported, for other machines to compare with; None in bundles of older versions.
    drawn_cosine: float | None = None  # of embeddings, on drawn pictures (`models.precision.agreement`)
    instructions: str | None = None  # of the processor, for int8 (`models.precision.instructions`); or "none"

    @property
    def is_sufficient(self) -> bool:
        """Whether the variant may be written. False if any value is NaN."""
        features = 1.0 if self.top_features is None else self.top_features
        return self.top1 >= TOP1 and self.ledger_cosine >= LEDGER_COSINE and features >= TOP_FEATURES

    @property
    def beside_the_least(self) -> str:
        """The figures, and in brackets the least of each that is enough."""
        features = "" if self.top_features is None else f", top features {self.top_features:.1%} ({TOP_FEATURES:.0%})"
        return (
            f"on {self.images:,} images top-1 {self.top1:.1%} (at least {TOP1:.0%}), cosine of the ledgers "
            f"{self.ledger_cosine:.4f} ({LEDGER_COSINE}){features}"
        )


class LabelQuality(_Part):
    """How well automatic labels predict where features fire, on images not used to choose labels or thresholds."""

    held_out_images: int
    labelled: int  # features
    measured: int  # of those, the ones that fire on enough of these images but not on all
    auroc_share: float | None  # of the measured ones: AUROC of 0.8 or better
    auroc_share_shuffled: float | None  # the same with labels shuffled among the labelled features


class CardsSummary(_Part):
    """What the cards were made from, and the quality of their labels."""

    data: str
    images: int  # from which exemplars were chosen
    vocabulary: int  # words
    features_cls: int  # features read at [CLS]; the others are read at patches
    # Per reading: the `score` that a label must reach (in older bundles clarity and margin, too); None: no label was
    # good enough.
    thresholds: dict[Literal["cls", "patches"], dict[str, float] | None]
    quality: LabelQuality
    pictures: Literal["thumbnails", "means", "none"]
    references: int  # images for retrieval, by the CLT's features


class ResidualSummary(_Part):
    """The residual SAEs of a bundle: one after every block but the last, so that each list has L - 1 numbers."""

    features: tuple[_Count, ...]  # F
    k: tuple[_Count, ...]  # budgets of the sparsifier at patches
    k_cls: tuple[_Count, ...]  # and at [CLS]
    sparsifier: Literal["relu_topk", "abs_topk", "jumprelu", "batch_topk"]
    tables: Literal["float32", "float16"]  # precision of the SAEs' weights
    bytes: Annotated[int, Field(gt=0)]  # of their files
    data: Data
    recipe: str  # the text of the recipe, as used
    metrics: Metrics  # of standardised tokens


class FileEntry(_Part):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class Manifest(_Part):
    format_version: int = FORMAT
    name: str
    description: str
    clip: ClipIdentity
    preprocessing: Preprocessing
    shape: Shape
    sparsifier: Literal["relu_topk", "abs_topk", "jumprelu", "batch_topk"] | None = None  # None: no CLT
    logit_scale: _LogitScale
    text: Text
    precisions: tuple[Precision, ...] = ("fp32",)  # of the vision graph; all except fp32 in vision.<precision>.onnx
    agreement: dict[Variant, Agreement] = {}  # of each variant with fp32
    tables: Literal["float32", "float16"]  # precision of directions and of the CLT's weights in the graph
    data: Data | None = None  # that the CLT was trained on; None: no CLT
    recipe: str  # the text of the recipe, as used; of a bundle without a CLT, empty
    metrics: Metrics
    licence: str
    cards: CardsSummary | None = None  # of the CLT's features
    residual: ResidualSummary | None = None
    residual_cards: CardsSummary | None = None  # of the residual SAEs' features
    files: dict[str, FileEntry] = {}

    @property
    def has_features(self) -> bool:
        """Whether there is a CLT. Without one, accounts have the MLPs' rows in the place of its features'."""
        return self.shape.features > 0

    @property
    def why_no_features(self) -> str:
        """Of a bundle without a CLT: a clause for errors about what it has not."""
        return (
            f"the bundle {self.name!r} has no CLT and therefore no features; train a CLT with `vitrine train`, and "
            f"export it with `vitrine export --checkpoint`"
        )

    def features_of(self, dictionary: Dictionary) -> tuple[int, ...]:
        """Features by layer; none where the bundle has no such dictionary."""
        if dictionary == "clt":
            return (self.shape.features,) * self.shape.layers if self.has_features else ()
        return self.residual.features if self.residual else ()

    def cards_of(self, dictionary: Dictionary) -> CardsSummary | None:
        """The summary of the cards of its features."""
        return self.cards if dictionary == "clt" else self.residual_cards

    @model_validator(mode="after")
    def _square_patches(self) -> Manifest:
        patches = self.shape.tokens - 1
        rows, columns = patch_grid(self.preprocessing, patches)
        if not patches or rows * columns != patches:
            raise ValueError(f"shape.tokens: {patches} patches do not fill an image of preprocessing.size")
        return self

    @model_validator(mode="after")
    def _of_the_clt(self) -> Manifest:
        """What a CLT brings along is there with one, and not without."""
        for name in ("sparsifier", "data"):
            if (getattr(self, name) is not None) != self.has_features:
                has = (
                    "it is missing, but there are features"
                    if self.has_features
                    else "it is given, but there are no features"
                )
                raise ValueError(f"{name} describes the CLT's features: {has} (shape.features)")
        if self.cards is not None and not self.has_features:
            raise ValueError("cards are given, but there is no CLT (shape.features)")
        return self

    @model_validator(mode="after")
    def _one_sae_per_block(self) -> Manifest:
        for name in ("features", "k", "k_cls") if self.residual else ():
            numbers, layers = len(getattr(self.residual, name)), self.shape.layers
            if numbers != layers - 1:
                raise ValueError(f"residual.{name} has {numbers} numbers, but {layers} layers have {layers - 1} SAEs")
        return self

    @model_validator(mode="after")
    def _cards_of_saes(self) -> Manifest:
        if self.residual_cards is not None and self.residual is None:
            raise ValueError("residual_cards are given, but there are no residual SAEs")
        return self

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name:
                raise ValueError(f"file name {name!r} points outside the bundle")
            if not path.parts or str(path) != name or not name.isprintable():
                raise ValueError(f"file name {name!r} is not a plain path")
        return files


def graphs_digest(manifest: Manifest, residual: bool = False) -> str:
    """sha256:... of a bundle's graphs and of the tables that they read, whatever cards, label sets and edits lie beside
    them. residual: with those of the residual SAEs, which may be added to a bundle later."""
    files = sorted(
        (name, entry.sha256)
        for name, entry in manifest.files.items()
        if name.endswith(READ_BY_GRAPHS) and "/" not in name and (residual or not name.startswith(RESIDUAL))
    )
    return "sha256:" + hashlib.sha256(json.dumps(files).encode()).hexdigest()
