"""From a checkpoint, the bundle exported of it, and its data to the same bundle with cards: `vitrine cards`.

The exemplars come from the recipe's train images. Its val images are the held-out ones: every other one calibrates the
thresholds of labels, the rest measures the labels that were given.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vitrine.models.bundle.bundle import Bundle, file_sha256, seal
from vitrine.models.bundle.manifest import CardsSummary
from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.errors import VitrineError
from vitrine.training.cards.describe import describe_features
from vitrine.training.cards.labels import Thresholds
from vitrine.training.cards.pictures import Album, Pictures
from vitrine.training.cards.survey import CLS, PATCHES, Saver, Survey, batches
from vitrine.training.cards.tables import write_features, write_images
from vitrine.training.cards.vocabulary import NAMED, embed, read_vocabulary
from vitrine.training.data.images import Images
from vitrine.training.data.sources import open_images
from vitrine.training.evaluation.evaluate import open_checkpoint

STATE = "survey.safetensors"
Order = tuple[Images, list[int]]  # a source and which of its images, in which order


class CardsBuildError(VitrineError, ValueError):
    """Cards cannot be made of these; the message says why."""


@dataclass(frozen=True)
class Options:
    """What a survey is made of, and how much of it is shown."""

    images: int = 15_000  # that exemplars are chosen from
    held_out: int = 5_000
    exemplars: int = 16  # a feature, for its label
    shown: int = 8  # of them in its card
    codes: int = 10_000  # images that coactivity is counted on
    references: int = 2_000  # images for retrieval
    coactive: int = 5  # features a card names
    vocabulary: tuple[str, ...] = NAMED
    pictures: Pictures = "thumbnails"
    seed: int = 0
    batch_size: int = 64
    workers: int = 1


def build_cards(
    clip: Clip, checkpoint: Path, bundle: Bundle, data_root: Path, out: Path, options: Options, console: Console
) -> Bundle:
    """Write `bundle` with cards to `out`, which must not exist; what an interrupted call left beside it is taken up.

    Raises `CardsBuildError` if the bundle was not exported from the checkpoint or `out` is there; `DataError` and
    `VocabularyError`.
    """
    if out.exists():
        raise CardsBuildError(f"{out} is there already; a bundle is never changed, give another --out")
    clt, meta = open_checkpoint(checkpoint, clip)
    _check_origin(clip, clt, bundle)
    words = read_vocabulary(options.vocabulary, bundle.manifest.text.labels)
    section, transform = meta.recipe.data, clip.transform()
    orders = [
        _sample(open_images(source, data_root, transform, section.max_broken), wanted, options.seed)
        for source, wanted in ((section.train, options.images), (section.val, options.held_out))
    ]
    work = out.with_name(f"{out.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    target = work / "bundle"
    with _progress(console) as progress:
        survey, album = _survey(clip, clt, bundle, orders, work, options, _key(checkpoint, orders, options), progress)
        embeddings = embed(clip, words, bundle.manifest.text.templates, progress)
        described = describe_features(survey, bundle, embeddings, options.seed)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(bundle.path, target, ignore=shutil.ignore_patterns("cards"))
        (target / "cards").mkdir()
        means, thumbnails = (album if options.pictures == kind else None for kind in ("means", "thumbnails"))
        shown = write_features(target, survey, described, words, means, options.shown, options.coactive, progress)
        references = min(options.references, len(survey.code_indices))
        train, order = orders[0]
        names = [_name(train, place, data_root) for place in order]
        write_images(target, survey, names, train.classes, shown, references, thumbnails)
    summary = CardsSummary(
        data=section.name,
        images=survey.exemplar_images,
        vocabulary=len(words),
        features_cls=int((described.reading == CLS).sum()),
        thresholds={"cls": _finite(described.thresholds[CLS]), "patches": _finite(described.thresholds[PATCHES])},
        quality=described.quality,
        pictures=options.pictures,
        references=references,
    )
    made = seal(target, bundle.manifest.model_copy(update={"cards": summary}))
    target.rename(out)
    shutil.rmtree(work)
    return Bundle(out, made.manifest, made.digest)


def _finite(thresholds: Thresholds) -> dict[str, float] | None:
    return thresholds._asdict() if np.isfinite(thresholds.score) else None


def _check_origin(clip: Clip, clt: CrossLayerTranscoder, bundle: Bundle) -> None:
    """Raise `CardsBuildError` unless the bundle holds this CLIP and this CLT."""
    kept, made = torch.from_numpy(np.array(bundle.directions)), clt.directions()
    if bundle.manifest.clip.sha256 != clip.sha256 or not torch.equal(made.to(kept.dtype), kept):
        raise CardsBuildError(f"{bundle.path} was not exported from this checkpoint: its CLIP or its CLT is another")


def _sample(data: Images, wanted: int, seed: int) -> Order:
    return data, np.random.default_rng(seed).permutation(len(data))[:wanted].tolist()


def _survey(
    clip: Clip,
    clt: CrossLayerTranscoder,
    bundle: Bundle,
    orders: list[Order],
    work: Path,
    options: Options,
    key: str,
    progress: Progress,
) -> tuple[Survey, Album | None]:
    """The finished survey, from where an earlier call was interrupted; pictures of its exemplar images."""
    images, held_out = (len(order) for _, order in orders)
    device = next(clip.tower.parameters()).device
    clt.to(device)
    survey = Survey.load(work / STATE, key)
    survey = survey or Survey.empty(clip.tower, clt, images, held_out, options.exemplars, options.codes)
    album = None
    if options.pictures != "none":
        album = Album(work / "pictures.npy", bundle.manifest.preprocessing, images, options.pictures)
    saver = Saver(survey, work / STATE, key)
    task = progress.add_task("images", total=images + held_out, completed=int(survey.seen))
    for pixels, classes in batches(orders, int(survey.seen), options.batch_size, options.workers):
        if album:
            album.add(int(survey.seen), pixels)
        survey.add(clip.tower, clt, pixels.to(device), classes)
        progress.advance(task, len(pixels))
        saver.maybe()
    saver.now()
    return survey, album


def _key(checkpoint: Path, orders: list[Order], options: Options) -> str:
    """What a survey depends on: of another one nothing is taken up."""
    kept = {name: asdict(options)[name] for name in ("exemplars", "codes", "pictures", "seed")}
    sources = [[data.title, len(data), len(order)] for data, order in orders]
    return json.dumps([file_sha256(checkpoint / "clt.safetensors"), sources, kept], sort_keys=True)


def _name(data: Images, place: int, data_root: Path) -> str:
    """An image's name for people, without the folders of this machine."""
    while (name := data.name(place)) in data.broken:  # the next readable one stood in for it
        place = (place + 1) % len(data)
    path = Path(name)
    return path.relative_to(data_root).as_posix() if path.is_relative_to(data_root) else name


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)
