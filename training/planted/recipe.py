"""The recipe of a planted cue: which CLIP, photos and cue, how it is fine-tuned, and the dictionaries of the result."""

from __future__ import annotations

from pydantic import Field

from vitrine.training.planted.data import PlantedData
from vitrine.training.planted.fine_tuning import FineTuning
from vitrine.training.recipes.image_sources import FolderSource, Section
from vitrine.training.recipes.recipe import (
    BundleSection,
    ClipSection,
    CltRecipe,
    CltSection,
    CltTrainingSection,
    DataSection,
    ResidualSaeRecipe,
    ResidualSaeSection,
    Template,
    TrainingSection,
)

CLIP = ClipSection(config="clip/planted-clip.json", weights="clip/model.safetensors")


class ResidualSection(Section):
    """Residual SAEs beside the CLT."""

    sae: ResidualSaeSection
    training: TrainingSection = TrainingSection()


class PlantedRecipe(Section):
    """One TOML file."""

    name: str
    clip: ClipSection
    templates: tuple[Template, ...] = Field(min_length=1)
    data: PlantedData
    fine_tuning: FineTuning | None = Field(default=None, description="none: the cue is only in val and test")
    clt: CltSection
    training: CltTrainingSection = CltTrainingSection()
    residual: ResidualSection | None = None

    def of_clt(self, labels: tuple[str, ...]) -> CltRecipe:
        """The recipe of the CLT; paths are below the folder that `make` writes."""
        return CltRecipe(
            name=self.name,
            clip=CLIP,
            data=self._data(labels),
            clt=self.clt,
            training=self.training,
            bundle=BundleSection(description="A CLIP with a planted cue, to measure repairs on.", variants=()),
        )

    def of_saes(self, labels: tuple[str, ...], residual: ResidualSection) -> ResidualSaeRecipe:
        """The recipe of the residual SAEs."""
        return ResidualSaeRecipe(
            kind="residual_sae",
            name=f"{self.name}-residual",
            clip=CLIP,
            data=self._data(labels),
            residual_sae=residual.sae,
            training=residual.training,
        )

    def _data(self, labels: tuple[str, ...]) -> DataSection:
        return DataSection(
            name=f"{self.name}: photos with a planted cue",
            train=FolderSource(kind="folder", path="data/train"),
            val=FolderSource(kind="folder", path="data/calibration"),
            labels=labels,
            templates=self.templates,
        )
