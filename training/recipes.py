"""A recipe is one TOML file: which CLIP, which images, which CLT, how it is trained. It *is* the configuration.

Paths in a recipe are relative to the data root given on the command line, so a recipe holds for every machine.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from models.errors import VitrineError

Template = Annotated[str, Field(pattern=r"\{\}")]


class RecipeError(VitrineError, ValueError):
    """The recipe cannot be used; the message says which key and why."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClipSection(_Section):
    """The CLIP to explain, as `models.clip.load_clip` takes it."""

    name: str | None = Field(default=None, description="open_clip's name, or hf-hub:org/model")
    weights: str | None = Field(default=None, description="open_clip's tag, or a checkpoint file under the data root")
    config: str | None = Field(default=None, description="open_clip model configuration under the data root")

    @model_validator(mode="after")
    def _one_of(self) -> ClipSection:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` (known to open_clip) or `config` (a file)")
        return self


class DataSection(_Section):
    """Images in class folders, and the labels that the bundle offers by default."""

    name: str
    licence: str = "unknown"
    train: str
    val: str
    labels: tuple[str, ...] = Field(min_length=1)
    templates: tuple[Template, ...] = Field(min_length=1)


class CltSection(_Section):
    features: PositiveInt = Field(description="F, features a layer")
    k: PositiveInt = Field(description="active features a layer and token")

    @model_validator(mode="after")
    def _k_fits(self) -> CltSection:
        if self.k > self.features:
            raise ValueError(f"k = {self.k} is larger than features = {self.features}")
        return self


class TrainingSection(_Section):
    seed: int = 0
    epochs: PositiveInt = 1
    images_per_step: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3
    warmup_steps: int = Field(default=100, ge=0)
    decay_share: float = Field(
        default=1.0, gt=0, le=1, description="last share of the run in which the rate falls to 0"
    )
    gradient_clip: PositiveFloat = 1.0
    cls_weight: PositiveFloat = Field(default=1.0, description="weight of [CLS] in the loss; a patch weighs 1")
    normalisation_images: PositiveInt = Field(
        default=1024, description="images over which the activations' scale is estimated"
    )
    checkpoint_every: PositiveInt = Field(default=500, description="steps")
    workers: int = Field(default=1, ge=0, description="processes that decode images")


class BundleSection(_Section):
    """What `vitrine export` makes of the trained CLT."""

    description: str = "A CLIP and its Cross-Layer Transcoder."
    licence: str = "unstated"
    tables: Literal["float32", "float16"] = Field(default="float32", description="precision of the CLT in the bundle")


class Recipe(_Section):
    name: str
    clip: ClipSection
    data: DataSection
    clt: CltSection
    training: TrainingSection = TrainingSection()
    bundle: BundleSection = BundleSection()


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe. Raises `RecipeError` naming every wrong key, with the nearest right one."""
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError as error:
        raise RecipeError(f"recipe {path} does not exist") from error
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not TOML: {error}") from error
    except ValidationError as error:
        lines = [_explain(problem["loc"], problem["type"], problem["msg"]) for problem in error.errors()]
        raise RecipeError(f"recipe {path}:\n  " + "\n  ".join(lines)) from error


def _explain(location: tuple[int | str, ...], kind: str, message: str) -> str:
    where = ".".join(map(str, location))
    if kind != "extra_forbidden":
        return f"{where}: {message}"
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        section = section.model_fields[str(part)].annotation  # type: ignore[assignment]
    near = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1, cutoff=0.5)
    return f"{where}: no such key" + (
        f"; did you mean `{near[0]}`?" if near else f" (keys: {', '.join(section.model_fields)})"
    )
