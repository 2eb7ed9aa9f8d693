"""The cards' tables, from what was seen and said: `models.bundle.cards` says what is in them and reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from vitrine.models.bundle.cards import BINS, FEATURES, IMAGES, QUANTILES, REFERENCES, Abstention
from vitrine.training.cards.coactivity import Together, coactive
from vitrine.training.cards.describe import Described
from vitrine.training.cards.pictures import Album
from vitrine.training.cards.survey import CLS, PATCHES, Survey, histogram, quantiles

# Rows read at once for one card: few, since masks and pictures come along.
ROWS_A_GROUP = 256
_SCHEMA = pa.schema(
    {
        "layer": pa.int16(),
        "index": pa.int32(),
        "read_at": pa.string(),
        "frequency_cls": pa.float32(),
        "frequency_patches": pa.float32(),
        "quantiles": pa.list_(pa.float32()),
        "largest": pa.float32(),
        "histogram": pa.list_(pa.int32()),
        "exemplars": pa.list_(pa.struct({"image": pa.int32(), "activation": pa.float32(), "mask": pa.binary()})),
        "mask_scale": pa.float32(),
        "mean_picture": pa.binary(),
        "label": pa.string(),
        "abstained": pa.string(),
        "label_score": pa.float32(),
        "label_margin": pa.float32(),
        "label_clarity": pa.float32(),
        "label_auroc": pa.float32(),
        "writes": pa.string(),
        "writes_score": pa.float32(),
        "writes_margin": pa.float32(),
        "coactive": pa.list_(pa.struct({"layer": pa.int16(), "index": pa.int32(), "jaccard": pa.float32()})),
    }
)


def write_features(
    bundle: Path,
    survey: Survey,
    described: Described,
    words: Sequence[str],
    means: Album | None,
    shown: int,
    coactive_shown: int,
    progress: Progress,
) -> set[int]:
    """features.parquet, with `shown` exemplars and `coactive_shown` others a card, and a mean picture if there are
    `means`; returns the numbers of the images that are exemplars."""
    layers, features = survey.fires.shape[1:]
    codes = survey.code_indices.numpy(), survey.code_values.numpy()
    together = coactive(*codes, features, coactive_shown)
    images: set[int] = set()
    task = progress.add_task("cards", total=layers * features)
    with pq.ParquetWriter(bundle / FEATURES, _SCHEMA, compression="zstd", compression_level=9) as writer:
        for layer in range(layers):
            rows = []
            for row in _rows(survey, described, words, layer, shown, means, together):
                images.update(exemplar["image"] for exemplar in row["exemplars"])
                rows.append(row)
                progress.advance(task)
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA), row_group_size=ROWS_A_GROUP)
    return images


def write_images(
    bundle: Path,
    survey: Survey,
    names: Sequence[str],
    classes: Sequence[str],
    shown: set[int],
    references: int,
    thumbnails: Album | None,
) -> None:
    """images.parquet, of those that cards show and of the first `references`, and the codes of these.

    names: of all exemplar images; classes: of their source.
    """
    numbers = sorted(shown | set(range(references)))
    table = {
        "image": pa.array(numbers, pa.int32()),
        "name": pa.array([names[number] for number in numbers], pa.string()),
        "class_name": pa.array([classes[int(survey.classes[number])] for number in numbers], pa.string()),
        "picture": pa.array([thumbnails.picture(n) if thumbnails else None for n in numbers], pa.binary()),
    }
    pq.write_table(pa.table(table), bundle / IMAGES, compression="zstd", row_group_size=ROWS_A_GROUP)
    indices = survey.code_indices[:references].numpy()
    fits = np.uint16 if survey.fires.shape[-1] <= 2**16 else np.int32
    values = survey.code_values[:references].numpy()
    np.savez_compressed(bundle / REFERENCES, indices=indices.astype(fits), values=values)


def _rows(
    survey: Survey,
    described: Described,
    words: Sequence[str],
    layer: int,
    shown: int,
    means: Album | None,
    together: list[list[Together]],
) -> Iterator[dict[str, Any]]:
    """One layer's rows."""
    _, features = described.reading.shape
    counted = survey.fires[CLS, layer] / survey.exemplar_images
    patches = survey.fires[PATCHES, layer] / (survey.exemplar_images * survey.masks.shape[-1])
    reading = described.reading[layer]
    bins = survey.bins[:, layer].gather(0, reading[None, :, None].expand(1, -1, survey.bins.shape[-1]))[0]
    largest = described.values[layer].abs().amax(-1)
    spread, counts = quantiles(bins, QUANTILES), histogram(bins, largest, BINS)
    written = described.written
    for index in range(features):
        place = layer * features + index
        fires = bool(largest[index] > 0)
        exemplars, scale = _exemplars(survey, described, layer, index, shown)
        label = described.label
        known = bool(described.full[place])
        writes = written.score[place] >= described.written_floor
        yield {
            "layer": layer,
            "index": index,
            "read_at": "cls" if reading[index] == CLS else "patches",
            "frequency_cls": float(counted[index]),
            "frequency_patches": float(patches[index]),
            "quantiles": spread[index].tolist() if fires else [],
            "largest": float(largest[index]),
            "histogram": counts[index].tolist() if fires else [],
            "exemplars": exemplars,
            "mask_scale": scale,
            "mean_picture": _mean(described, layer, index, means),
            "label": words[label.word[place]] if described.labelled[place] else None,
            "abstained": _abstained(described, place),
            "label_score": label.score[place] if known else None,
            "label_margin": label.margin[place] if known else None,
            "label_clarity": label.clarity[place] if known else None,
            "label_auroc": _number(described.auroc[place]) if described.labelled[place] else None,
            "writes": words[written.word[place]] if writes else None,
            "writes_score": written.score[place] if writes else None,
            "writes_margin": written.margin[place] if writes else None,
            "coactive": [
                {"layer": other // features, "index": other % features, "jaccard": jaccard}
                for other, jaccard in together[place]
            ],
        }


def _exemplars(
    survey: Survey, described: Described, layer: int, index: int, shown: int
) -> tuple[list[dict[str, Any]], float]:
    """(the first exemplars, what 255 stands for in their masks: the same in all of them, so that they compare)."""
    masks = survey.masks[described.reading[layer, index], layer, index, :shown].float()
    scale = float(masks.max()) or 1.0
    levels = (masks / scale * 255).round().byte().numpy()
    values, images = described.values[layer, index], described.exemplars[layer, index]
    found = [
        {"image": int(images[at]), "activation": float(values[at]), "mask": levels[at].tobytes()}
        for at in range(min(shown, len(values)))
        if values[at] != 0
    ]
    return found, scale


def _mean(described: Described, layer: int, index: int, album: Album | None) -> bytes | None:
    """None for a feature without all its exemplars, too: the mean of one or two images would show them."""
    full = described.full.reshape(described.reading.shape)[layer, index]
    return album.mean(described.exemplars[layer, index].numpy()) if album and full else None


def _abstained(described: Described, place: int) -> Abstention | None:
    if described.labelled[place]:
        return None
    if not described.full[place]:
        return "too_few_exemplars"
    label, thresholds = described.label, described.thresholds[int(described.reading.flatten()[place])]
    if not label.score[place] >= thresholds.score:
        return "score"
    return "clarity" if not label.clarity[place] >= thresholds.clarity else "margin"


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
