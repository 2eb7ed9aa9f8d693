"""Adds cards of a dictionary's features to a bundle, from its checkpoint and data: `vitrine cards`.

The exemplars come from the recipe's train images. Its val images are the held-out images: every other one calibrates
the label thresholds, the rest measure the quality of the labels.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import CARDS, MANIFEST
from vitrine.models.bundle.manifest import CardsSummary
from vitrine.models.bundle.sealing import file_sha256, seal
from vitrine.models.clip.loading import Clip
from vitrine.models.files.problems import naming
from vitrine.models.files.writing import move_folder, prepare_folder
from vitrine.models.progress import Progress
from vitrine.models.stopping import Stopped, advising, noted_signals
from vitrine.training.cards.describe import describe_features
from vitrine.training.cards.dictionary import CardsBuildError, Dictionary, open_dictionary
from vitrine.training.cards.pictures import Album, Pictures
from vitrine.training.cards.survey import CLS, PATCHES, Saver, Survey, batches
from vitrine.training.cards.tables import write_features, write_images
from vitrine.training.cards.vocabulary import NAMED, embed, read_vocabulary
from vitrine.training.checkpoint import weights_file
from vitrine.training.data.images import Images
from vitrine.training.data.sources import open_images

STATE = "survey.safetensors"
Order = tuple[Images, list[int]]  # a source and the indices of its images, in order


@dataclass(frozen=True)
class Options:
    """The size of a survey, and what cards show of it."""

    images: int = 15_000  # from which exemplars are chosen
    held_out: int = 5_000
    exemplars: int = 16  # per feature, for its label
    shown: int = 8  # exemplars in a card
    codes: int = 10_000  # images on which coactivity is counted
    references: int = 2_000  # images for retrieval, by a CLT's features
    coactive: int = 5  # coactive features in a card
    vocabulary: tuple[str, ...] = NAMED
    pictures: Pictures = "thumbnails"
    seed: int = 0
    batch_size: int = 64
    workers: int = 1


def build_cards(
    clip: Clip, checkpoint: Path, bundle: Bundle, data_root: Path, out: Path, options: Options, console: Console
) -> Bundle:
    """Write `bundle` with cards of the checkpoint's features to `out`, which must not exist; those of the bundle's
    other dictionary stay. An interrupted call is resumed from files beside it.

    Raises `CardsBuildError` if the bundle was not exported from the checkpoint or `out` exists; `CheckpointError`;
    `DataError` and `VocabularyError`; `FileError`.
    """
    if out.exists():
        raise CardsBuildError(f"{out} already exists, and a bundle is never changed; choose another --out")
    dictionary, meta = open_dictionary(checkpoint, clip, bundle)
    words = read_vocabulary(options.vocabulary, bundle.manifest.text.labels)
    section, transform = meta.recipe.data, clip.transform()
    orders = [
        _sample(open_images(source, data_root, transform, section.max_broken, section.classes), count, options.seed)
        for source, count in ((section.train, options.images), (section.val, options.held_out))
    ]
    for data, _ in orders:
        data.print_summary(console)
    work = out.with_name(f"{out.name}.partial")
    prepare_folder(work)
    target = work / "bundle"
    folder, key = CARDS[dictionary.name], _key(weights_file(checkpoint, meta), orders, options)
    with Progress(console) as progress, advising("run the same command again to continue with the remaining images"):
        survey, album = _survey(clip, dictionary, bundle, orders, work, options, key, progress)
        for data, _ in orders:
            data.print_broken(console)
        embeddings = embed(clip, words, bundle.manifest.text.templates, progress)
        progress.begin("labels of all features")
        directions = (rows.float().cpu() for rows in dictionary.directions())
        fold = torch.from_numpy(bundle.fold.astype(np.float32))
        descriptions = describe_features(survey, directions, fold, embeddings, options.seed)
        shutil.rmtree(target, ignore_errors=True)
        means, thumbnails = (album if options.pictures == kind else None for kind in ("means", "thumbnails"))
        references = min(options.references, len(survey.code_indices)) if dictionary.name == "clt" else 0
        train, order = orders[0]
        names = [_name(train, index, data_root) for index in order]
        with naming(target):
            others = shutil.ignore_patterns(folder)
            shutil.copytree(bundle.path, target, ignore=others, copy_function=shutil.copyfile)
            target.chmod(target.stat().st_mode | 0o700)  # the other one may be read-only
            cards = target / folder
            cards.mkdir()
            features, shown = dictionary.features, (options.shown, options.coactive)
            written = write_features(cards, survey, features, descriptions, words, means, *shown, progress)
            write_images(cards, survey, names, train.classes, written, references, thumbnails)
    summary = CardsSummary(
        data=section.name,
        images=survey.exemplar_images,
        vocabulary=len(words),
        features_cls=int((descriptions.reading == CLS).sum()),
        thresholds={"cls": _finite(descriptions.thresholds[CLS]), "patches": _finite(descriptions.thresholds[PATCHES])},
        quality=descriptions.quality,
        pictures=options.pictures,
        references=references,
    )
    with naming(target):
        sealed = seal(target, bundle.manifest.model_copy(update={folder: summary}))
    with naming(out):
        move_folder(target, out, last=MANIFEST)
    shutil.rmtree(work, ignore_errors=True)
    return replace(sealed, path=out)


def _finite(threshold: float) -> dict[str, float] | None:
    return {"score": threshold} if np.isfinite(threshold) else None


def _sample(data: Images, count: int, seed: int) -> Order:
    return data, np.random.default_rng(seed).permutation(len(data))[:count].tolist()


def _survey(
    clip: Clip,
    dictionary: Dictionary,
    bundle: Bundle,
    orders: list[Order],
    work: Path,
    options: Options,
    key: str,
    progress: Progress,
) -> tuple[Survey, Album | None]:
    """The finished survey, resumed if an earlier call was interrupted; pictures of its exemplar images."""
    images, held_out = (len(order) for _, order in orders)
    device = next(clip.tower.parameters()).device
    survey = Survey.load(work / STATE, key)
    survey = survey or Survey.empty(clip.tower, dictionary, images, held_out, options.exemplars, options.codes)
    album = None
    if options.pictures != "none":
        album = Album(work / "pictures.npy", bundle.manifest.preprocessing, images, options.pictures)
    saver = Saver(survey, work / STATE, key)
    task = progress.task("survey", images + held_out, "images", int(survey.seen))
    with noted_signals() as noted:  # a batch is counted whole or not at all
        for pixels, classes in batches(orders, int(survey.seen), options.batch_size, options.workers):
            if album:
                album.add(int(survey.seen), pixels)
            survey.add(clip.tower, dictionary, pixels.to(device), classes)
            task.advance(len(pixels))
            saver.save_if_due()
            if noted.number:
                break
        saver.save()
    if noted.number:
        raise Stopped(noted.number)
    return survey, album


def _key(weights: Path, orders: list[Order], options: Options) -> str:
    """Everything a survey depends on: only a survey with the same key is resumed."""
    settings = {name: asdict(options)[name] for name in ("exemplars", "codes", "pictures", "seed")}
    sources = [[data.title, len(data), len(order)] for data, order in orders]
    return json.dumps([file_sha256(weights), sources, settings], sort_keys=True)


def _name(data: Images, index: int, data_root: Path) -> str:
    """An image's human-readable name, relative to the data root."""
    while (name := data.name(index)) in data.broken:  # it was replaced by the next readable image
        index = (index + 1) % len(data)
    path = Path(name)
    return path.relative_to(data_root).as_posix() if path.is_relative_to(data_root) else name
