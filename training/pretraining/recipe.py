"""The recipe of a small CLIP from scratch (`vitrine pretrain`): read before torch is loaded."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from vitrine.training.recipes.image_sources import Section, Source
from vitrine.training.recipes.recipe import Share, Template


class ModelSection(Section):
    """open_clip's own configuration of a model."""

    embed_dim: PositiveInt
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]

    @field_validator("vision_cfg")
    @classmethod
    def _square(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("image_size"), int):
            raise ValueError("image_size must be one number of pixels: images are square")
        return value


class PretrainData(Section):
    """Labelled images. If their size differs from the model's, the shorter edge is resized and the centre cropped."""

    train: Source
    val: Source
    labels: tuple[str, ...] = Field(min_length=1, description="in the order of the data's classes")
    templates: tuple[Template, ...] = Field(min_length=1)


class PretrainTraining(Section):
    seed: int = 0
    epochs: PositiveInt
    images_per_step: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-3
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_share: Share = 0.05
    label_smoothing: Share = 0.1
    patches_dropped: float = Field(
        default=0.5, ge=0, lt=1, description="share of patches left out; a ViT learns nearly as much"
    )
    all_patches_share: Share = Field(default=0.125, description="last share of the run, in which every patch is used")
    crop_padding: int = Field(default=4, ge=0, description="largest shift of images, in pixels")
    workers: int = Field(default=1, ge=0, description="processes that decode images")


class PretrainRecipe(Section):
    name: str = Field(
        pattern=r"^\w[\w.-]*$", description="name of the configuration file, and of the model in open_clip"
    )
    model: ModelSection
    data: PretrainData
    training: PretrainTraining
