"""Where a recipe's images come from: folders, torchvision, the Hugging Face hub, or shards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FolderSource(Section):
    """Class folders: path/<class>/*.jpg."""

    kind: Literal["folder"]
    path: str = Field(description="folder under the data root")
    classes: bool = Field(default=True, description="false: its folders are not classes")


class TorchvisionSource(Section):
    """One of torchvision's data sets, downloaded to the data root if missing.

    Class folders <lower-case name>/<split>/<class>/ under the data root are used instead, if present.
    """

    kind: Literal["torchvision"]
    name: str = Field(description="class name in torchvision.datasets, such as CIFAR100")
    split: Literal["train", "val"] = Field(description="val: torchvision's test or val split")


class HuggingFaceSource(Section):
    """A data set of the Hugging Face hub, or a folder that `datasets.load_dataset` reads."""

    kind: Literal["huggingface"]
    id: str = Field(description="data set of the hub, such as clane9/imagenet-100, or a folder under the data root")
    split: str
    image: str = Field(default="image", description="column of the image")
    label: str = Field(
        default="label", description="column of the class; `objects` for detection sets: the class of the largest box"
    )


class WebDatasetSource(Section):
    """Tar shards in WebDataset's layout: key.jpg (png, ...) with key.cls (an index) or key.txt (a class name)."""

    kind: Literal["webdataset"]
    shards: str = Field(description="under the data root: shards/train-{000000..000099}.tar, a glob, or a folder")
    classes: str | None = Field(default=None, description="text file under the data root, one class name per line")
    skip_broken: bool = Field(default=False, description="report damaged or missing shards and continue without them")


Source = Annotated[FolderSource | TorchvisionSource | HuggingFaceSource | WebDatasetSource, Field(discriminator="kind")]
