"""Makes a CLIP with a planted cue, its groups and its dictionaries in one folder. What is there already is kept.

    OUT/data/           `training.planted.data`
        clip/           the fine-tuned CLIP, open_clip's configuration and weights
        clt/, saes/     runs of the trainer
        planted.json    cue, classes, accuracy by group of the CLIP as it was, of the planted one and of its twin
        bundle/         written by the command, as `vitrine export` does

The twin is fine-tuned alike on the same photos, where the cue is independent of the class: the gap between its worst
group and the planted CLIP's is what a repair can hope to close.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from rich.console import Console
from torch import Tensor, nn

from vitrine.models.clip.loading import Clip, load_clip
from vitrine.models.files.problems import naming
from vitrine.models.files.writing import prepare_folder, write_text
from vitrine.models.groups import Accuracy, Judge
from vitrine.models.images.decode import TRUSTED, decode
from vitrine.models.inputs.files import read_file
from vitrine.models.progress import Progress
from vitrine.training.checkpoint import CheckpointError, first_problem
from vitrine.training.data.images import load
from vitrine.training.data.sources import open_images
from vitrine.training.planted.cue import Cue
from vitrine.training.planted.data import TABLE, Planted, as_it_is, grouped, plan, read_table, write_data
from vitrine.training.planted.fine_tuning import CONFIG, WEIGHTS, fine_tune, save
from vitrine.training.planted.recipe import PlantedRecipe
from vitrine.training.recipes.image_sources import FolderSource
from vitrine.training.run.run import train

RECORD = "planted.json"
BATCH = 250  # images


class Record(BaseModel):
    """planted.json."""

    recipe: PlantedRecipe
    cue: Cue
    classes: tuple[str, str]  # the cue goes with the first
    labels: tuple[str, ...]  # all that the CLIP is fine-tuned to tell apart
    accuracy: dict[str, Accuracy] = {}  # on test: "own" (as it was), "planted", "twin"
    seconds: dict[str, float] = {}  # of processor time, by step


def make(recipe: PlantedRecipe, clip: Clip, data_root: Path, out: Path, console: Console) -> Record:
    """Everything but the twin and the bundle. Raises `CheckpointError` if `out` is of another recipe."""
    prepare_folder(out)
    record = _begun(recipe, clip, data_root, out)
    labels = embeddings(clip, recipe, record.labels)
    if not (out / "data" / TABLE).exists():
        with _timed(record, "data"):
            write_data(recipe.data, Planted(record.cue, record.classes), data_root, clip.tower.image_size, out / "data")
    with Progress(console) as progress:
        if "own" not in record.accuracy:
            record.accuracy["own"] = _accuracy(clip, clip.model, out, labels, record)
        if not (out / "clip" / WEIGHTS).exists():
            with _timed(record, "fine-tuning"):
                save(_fine_tuned(clip, recipe, record, out, "train", labels, progress), clip, out / "clip")
        planted = load_planted(out)
        if "planted" not in record.accuracy:
            record.accuracy["planted"] = _accuracy(planted, planted.model, out, labels, record)
            _write(record, out)
    with _timed(record, "clt"):
        train(recipe.of_clt(record.labels), planted, out, out / "clt", console)
    if recipe.residual is not None:
        with _timed(record, "saes"):
            train(recipe.of_saes(record.labels, recipe.residual), planted, out, out / "saes", console)
    _write(record, out)
    return record


def measure_twin(recipe: PlantedRecipe, clip: Clip, out: Path, console: Console) -> Record:
    """Fine-tune and measure the twin, if that is not done and the recipe fine-tunes at all."""
    record = read_record(out)
    if "twin" not in record.accuracy and recipe.fine_tuning is not None:
        labels = embeddings(clip, recipe, record.labels)
        with Progress(console) as progress, _timed(record, "twin"):
            model = _fine_tuned(clip, recipe, record, out, "twin", labels, progress)
        record.accuracy["twin"] = _accuracy(clip, model, out, labels, record)
        _write(record, out)
    return record


def read_record(out: Path) -> Record:
    """Raises `CheckpointError` if `out` is no folder of this command."""
    try:
        with naming(out / RECORD):
            return Record.model_validate_json((out / RECORD).read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{out / RECORD} was not written by Vitrine: {first_problem(error)}") from error


def load_planted(out: Path) -> Clip:
    """The fine-tuned CLIP."""
    return load_clip(None, str(out / "clip" / WEIGHTS), out / "clip" / CONFIG)


def embeddings(clip: Clip, recipe: PlantedRecipe, labels: Sequence[str]) -> Tensor:
    """Unit embeddings [labels, D]."""
    return clip.encode_labels(list(labels), list(recipe.templates))


def pixels(clip: Clip, data: Path, images: Iterable[str]) -> Tensor:
    """Normalised pixels of images [n, 3, H, W]. data: the folder that their paths are below."""
    transform = clip.transform()
    return torch.stack([transform(decode(read_file(data / image), TRUSTED).image) for image in images])


@torch.no_grad()
def _accuracy(clip: Clip, model: Any, out: Path, labels: Tensor, record: Record) -> Accuracy:
    """On test, between the two classes."""
    rows = read_table(out / "data", "test")
    images = [row.image for row in rows]
    places = [record.labels.index(name) for name in record.classes]
    found = [
        model.encode_image(pixels(clip, out / "data", images[at : at + BATCH]), normalize=True) @ labels[places].T
        for at in range(0, len(images), BATCH)
    ]
    return Judge(grouped(rows, record.classes)).accuracy(torch.cat(found).argmax(-1).numpy())


def _begun(recipe: PlantedRecipe, clip: Clip, data_root: Path, out: Path) -> Record:
    if (out / RECORD).exists():
        record = read_record(out)
        if record.recipe != recipe:
            raise CheckpointError(f"{out} was made with another recipe; give the same one, or choose an empty folder")
        return record
    classes = tuple(dict.fromkeys(open_images(recipe.data.train, data_root, as_it_is).classes))
    labels = embeddings(clip, recipe, classes)
    planted = plan(recipe.data, classes, (labels @ labels.T).numpy())
    record = Record(recipe=recipe, cue=planted.cue, classes=planted.classes, labels=classes)
    _write(record, out)
    return record


def _fine_tuned(
    clip: Clip, recipe: PlantedRecipe, record: Record, out: Path, split: str, labels: Tensor, progress: Progress
) -> nn.Module:
    """The CLIP's model, fine-tuned on a split as the recipe says; itself if it says nothing."""
    if recipe.fine_tuning is None:
        model: nn.Module = clip.model
        return model
    source = FolderSource(kind="folder", path=f"data/{split}")
    images = open_images(source, out, clip.transform())
    place = torch.tensor([record.labels.index(name) for name in images.classes])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for read, classes in load(images, [part.tolist() for part in torch.arange(len(images)).split(BATCH)], 0):
            yield read, place[classes]

    return fine_tune(clip, batches(), labels, recipe.fine_tuning, recipe.data.seed, progress, f"fine-tuning, {split}")


@contextmanager
def _timed(record: Record, step: str) -> Iterator[None]:
    began = time.process_time()
    yield
    record.seconds[step] = record.seconds.get(step, 0.0) + time.process_time() - began


def _write(record: Record, out: Path) -> None:
    write_text(out / RECORD, record.model_dump_json(indent=1))
