"""A recipe is one TOML file: which CLIP, images, dictionary, and how it is trained. It is the whole configuration.

A recipe is of a kind: of a Cross-Layer Transcoder (`clt`), or of residual SAEs (`residual_sae`). Each kind is a class
with its own sections; what both have is in `Recipe`. Keys of the other kind are refused. Paths are relative to the data
root given on the command line, so a recipe is valid on every machine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from vitrine.models.dictionary.architecture import Architecture, Kind, SaeArchitecture
from vitrine.models.errors import VitrineError
from vitrine.models.inputs.lists import distinct
from vitrine.training.recipes.image_sources import Section, Source

Template = Annotated[str, Field(pattern=r"\{\}")]
Share = Annotated[float, Field(ge=0, le=1)]
Budget = Annotated[
    tuple[PositiveInt, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: (value,) if isinstance(value, int) else value),
]


class RecipeError(VitrineError, ValueError):
    """The recipe cannot be used; the message says which key and why."""


class ClipSection(Section):
    """The CLIP to explain, as accepted by `models.clip.loading.load_clip`."""

    name: str | None = Field(default=None, description="open_clip's name, or hf-hub:org/model")
    weights: str | None = Field(default=None, description="open_clip's tag, or a checkpoint file under the data root")
    config: str | None = Field(default=None, description="open_clip model configuration under the data root")
    quick_gelu: bool | None = Field(
        default=None,
        description="whether a checkpoint file was trained with QuickGELU, as OpenAI's were, where neither it nor the "
        "name says so; nothing is assumed",
    )

    @model_validator(mode="after")
    def _one_of(self) -> ClipSection:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` (a model of open_clip) or `config` (a file)")
        return self


class DataSection(Section):
    """Images for training and evaluation, and the bundle's default labels."""

    name: str = Field(description="for people: stands in the bundle's manifest and card")
    licence: str = Field(default="unknown", description="of the images")
    train: Source = Field(description="images to train on")
    val: Source = Field(description="images to measure on")
    labels: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="default: val's own classes, if it has any"
    )
    labels_file: str | None = Field(
        default=None, description="instead of `labels`: a text file under the data root, a label a line"
    )
    classes: dict[str, str] | None = Field(
        default=None, description='which label the images of a folder have: { "folder" = "label" }'
    )
    templates: tuple[Template, ...] = Field(
        default=("a photo of a {}.",), min_length=1, description="sentences with {}, averaged as CLIP does"
    )
    max_broken: Share = Field(default=0.01, description="share of unreadable images at which a run gives up")

    @model_validator(mode="after")
    def _labels(self) -> DataSection:
        if self.labels is not None and self.labels_file is not None:
            raise ValueError("give either `labels` or `labels_file`")
        if self.labels is not None:
            distinct(self.labels, "labels")
        return self


class DictionarySection(Section):
    """What both kinds of dictionary have."""

    features: int | Budget  # as each kind says
    k: Budget = Field(
        description="active features a token (jumprelu, batch_topk: on average); one number, or one a layer"
    )
    k_cls: Budget | None = Field(default=None, description="the same for [CLS]; default: k")
    sparsifier: Kind = Field(default="relu_topk", description="relu_topk, abs_topk, jumprelu or batch_topk")


class CltSection(DictionarySection):
    """The Cross-Layer Transcoder."""

    features: PositiveInt = Field(description="F, features a layer")
    cross_layer: bool = Field(default=True, description="false: per-layer transcoders, the baseline")

    @model_validator(mode="after")
    def _k_fits(self) -> CltSection:
        _check_budgets((self.features,), self.k, self.k_cls)
        return self

    def architecture(self, layers: int, width: int) -> Architecture:
        """The architecture for a tower of `layers` layers. Raises `RecipeError` if k has another number of entries."""
        of = f"the CLIP has {layers} layers"
        k = _per_layer("clt.k", self.k, layers, of)
        k_cls = k if self.k_cls is None else _per_layer("clt.k_cls", self.k_cls, layers, of)
        return Architecture(layers, width, self.features, k, k_cls, self.sparsifier, self.cross_layer)


class ResidualSaeSection(DictionarySection):
    """SAEs of the residual stream, one after every block but the last (arXiv 2509.17401): these are its layers."""

    features: Budget = Field(description="F of the SAE after each block but the last; one number, or one a layer")
    dead_weight: float = Field(
        default=1 / 32, ge=0, description="weight of the error that dead features leave of what the SAE misses; 0: none"
    )
    dead_features: PositiveInt = Field(default=256, description="dead features a token that may lessen it")

    @model_validator(mode="after")
    def _k_fits(self) -> ResidualSaeSection:
        _check_budgets(self.features, self.k, self.k_cls)
        return self

    def architecture(self, layers: int, width: int) -> SaeArchitecture:
        """The architecture for a tower of `layers` layers. Raises `RecipeError` if it has fewer than two, or a list
        another number of entries than there are SAEs."""
        if layers < 2:
            raise RecipeError("a CLIP of one layer has no residual SAEs: there is none after the last block")
        saes, of = layers - 1, f"the CLIP has {layers - 1} blocks before its last"
        features = _per_layer("residual_sae.features", self.features, saes, of)
        k = _per_layer("residual_sae.k", self.k, saes, of)
        k_cls = k if self.k_cls is None else _per_layer("residual_sae.k_cls", self.k_cls, saes, of)
        return SaeArchitecture(width, features, k, k_cls, self.sparsifier)


def _check_budgets(features: Budget, k: Budget, k_cls: Budget | None) -> None:
    """Every k within the features of its layer, as far as the recipe says which is which."""
    for name, budget in (("k", k), ("k_cls", k_cls or k)):
        layers = max(len(features), len(budget))
        if len(features) in (1, layers) and len(budget) in (1, layers):
            for most, least in zip(features * (layers // len(features)), budget * (layers // len(budget)), strict=True):
                if least > most:
                    raise ValueError(f"{name} = {least} is larger than features = {most}")


def _per_layer(name: str, budget: Budget, count: int, of: str) -> tuple[int, ...]:
    if len(budget) == 1:
        return budget * count
    if len(budget) != count:
        raise RecipeError(f"{name} has {len(budget)} numbers, but {of}")
    return budget


class TrainingSection(Section):
    """The reconstruction phase, of either kind."""

    seed: int = Field(default=0, description="of the first weights and of the order of images and tokens")
    epochs: PositiveInt = Field(default=1, description="passes over the images")
    images_per_step: PositiveInt = Field(default=32, description="a step sees the tokens of so many images")
    mixed_images: PositiveInt = Field(
        default=256, description="tokens of so many images are shuffled together; images_per_step: whole images a step"
    )
    learning_rate: PositiveFloat = Field(default=1e-3, description="of Adam, at its highest")
    beta2: float = Field(
        default=0.999, gt=0, lt=1, description="of Adam: how long squared gradients are remembered, a share a step"
    )
    warmup_steps: int = Field(default=100, ge=0, description="steps in which the rate rises to it")
    decay_share: float = Field(
        default=1.0, gt=0, le=1, description="last share of the run in which the rate falls to 0"
    )
    gradient_clip: PositiveFloat = Field(default=1.0, description="largest norm of a step's gradient")
    k_start: PositiveFloat = Field(default=1.0, ge=1, description="k begins at so many times its value")
    k_anneal_share: Share = Field(default=0.0, description="first share of the run in which k falls to its value")
    sparsity_weight: PositiveFloat = Field(default=1.0, description="jumprelu: weight of the loss on L0")
    sparsity_ramp_share: Share = Field(
        default=0.5, description="jumprelu: first share of the run in which that weight rises from 0"
    )
    revive_after: PositiveInt = Field(
        default=200_000, description="tokens without firing after which a feature counts as dead"
    )
    revive_rate: float = Field(
        default=1.0,
        ge=0,
        description="learning rates a step by which a dead feature's bias rises until it fires; 0: none",
    )
    revive_share: Share = Field(default=0.7, description="first share of the run in which dead features are revived")
    precision: Literal["32-true", "bf16-mixed"] = Field(
        default="32-true", description="bf16-mixed: the CLIP's and the encoders' products in bfloat16"
    )
    normalisation_images: PositiveInt = Field(
        default=1024, description="images over which the activations' scale is estimated"
    )
    checkpoint_every: PositiveInt = Field(default=500, description="steps between checkpoints")
    workers: int = Field(default=1, ge=0, description="processes that decode images")
    cache: Literal["none", "float32", "bfloat16"] = Field(
        default="none", description="keep activations on disk, in the run's folder, from the first epoch on"
    )

    @model_validator(mode="after")
    def _whole_steps(self) -> TrainingSection:
        if self.mixed_images % self.images_per_step:
            raise ValueError(
                f"mixed_images = {self.mixed_images} is not a multiple of images_per_step = {self.images_per_step}"
            )
        return self


class CltTrainingSection(TrainingSection):
    """Every MLP's output from the MLP inputs."""

    start: Literal["neurons", "random"] = Field(
        default="random", description="clt: the first weights: the MLPs' own neurons (not for abs_topk), or random"
    )
    cls_weight: PositiveFloat | None = Field(
        default=None,
        description="clt: weight of [CLS]'s unexplained variance; a patch weighs 1; default: root of their number",
    )


class CascadeSection(Section):
    """Fine-tuning in replacement mode, so that the whole cascade keeps CLIP's predictions."""

    steps: PositiveInt = Field(description="after the reconstruction's")
    images_per_step: PositiveInt = Field(default=32, description="whole images")
    learning_rate: PositiveFloat = Field(default=1e-4, description="of Adam, at its highest; falls to 0 by a cosine")
    warmup_steps: int = Field(default=100, ge=0, description="steps in which the rate rises to it")
    clean_weight: float = Field(default=1.0, ge=0, description="reconstruction on CLIP's own activations, as before")
    replaced_weight: float = Field(default=0.25, ge=0, description="reconstruction under replaced inputs")
    prediction_weight: float = Field(default=0.05, ge=0, description="divergence of the zero-shot distribution")


class BundleSection(Section):
    """Options of `vitrine export` for the trained CLT."""

    description: str = Field(default="A CLIP and its Cross-Layer Transcoder.", description="for the model card")
    licence: str = Field(default="unstated", description="of the bundle")
    tables: Literal["float32", "float16"] = Field(default="float32", description="precision of the CLT in the bundle")
    variants: tuple[Literal["int8", "fp16"], ...] = Field(
        default=("int8", "fp16"),
        description="faster vision graphs, each written if it agrees with float32 on val images",
    )
    replacement: bool = Field(
        default=False, description="the replacement graph: `explain.matrix`, `vitrine replay`; every decoder, in bytes"
    )
    sources: bool = Field(
        default=True,
        description="source accounts: `explain.sources`, `explain.attention`, circuits; the same decoders, stored once "
        "where there are both",
    )
    rerun: bool = Field(
        default=True,
        description="interventions in the running network (`mode: rerun`), if there are source accounts, whose tables "
        "they share",
    )


class Recipe(Section):
    """What the recipes of every kind have."""

    name: str
    clip: ClipSection
    data: DataSection
    training: TrainingSection


class CltRecipe(Recipe):
    """Of a Cross-Layer Transcoder."""

    kind: Literal["clt"] = "clt"
    clt: CltSection
    training: CltTrainingSection = CltTrainingSection()
    cascade: CascadeSection | None = None
    bundle: BundleSection = BundleSection()

    @property
    def dictionary(self) -> CltSection:
        """The section of what is trained."""
        return self.clt

    @model_validator(mode="after")
    def _start_fits(self) -> CltRecipe:
        if self.training.start == "neurons" and self.clt.sparsifier == "abs_topk":
            raise ValueError(
                'training.start = "neurons" cannot be used with abs_topk, which would choose silent neurons'
            )
        return self


class ResidualSaeRecipe(Recipe):
    """Of residual SAEs."""

    kind: Literal["residual_sae"]
    residual_sae: ResidualSaeSection
    training: TrainingSection = TrainingSection()

    @property
    def dictionary(self) -> ResidualSaeSection:
        """The section of what is trained."""
        return self.residual_sae


def kind_of(recipe: Any) -> Any:
    """The kind that a recipe, or what was read from its file, says it is of."""
    return recipe.get("kind", "clt") if isinstance(recipe, dict) else getattr(recipe, "kind", None)


AnyRecipe = Annotated[
    Annotated[CltRecipe, Tag("clt")] | Annotated[ResidualSaeRecipe, Tag("residual_sae")], Discriminator(kind_of)
]
