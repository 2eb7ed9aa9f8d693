"""Writes the tables of cards, from the survey and the descriptions; `models.bundle.cards` defines and reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitrine.models.bundle.cards import BINS, FEATURES, IMAGES, QUANTILES, REFERENCES, Abstention
from vitrine.models.progress import Progress
from vitrine.training.cards.coactivity import CoactiveFeature, coactive
from vitrine.training.cards.describe import FeatureDescriptions
from vitrine.training.cards.pictures import Album
from vitrine.training.cards.survey import CLS, PATCHES, Survey, histogram, quantiles

# Rows that are read together for one card: few, because rows contain masks and pictures.
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
    folder: Path,
    survey: Survey,
    features: Sequence[int],
    descriptions: FeatureDescriptions,
    words: Sequence[str],
    means: Album | None,
    shown: int,
    coactive_shown: int,
    progress: Progress,
) -> set[int]:
    """Write features.parquet, with `shown` exemplars and `coactive_shown` coactive features per card, and mean pictures
    if `means` is given; returns the numbers of the exemplar images. features: their numbers by layer."""
    codes = survey.code_indices.numpy(), survey.code_values.numpy()
    coactive_features = coactive(*codes, survey.fires.shape[-1], coactive_shown)
    images: set[int] = set()
    task = progress.task("cards", sum(features), "features")
    with pq.ParquetWriter(folder / FEATURES, _SCHEMA, compression="zstd", compression_level=9) as writer:
        for layer, count in enumerate(features):
            rows = []
            for row in _rows(survey, descriptions, words, layer, count, shown, means, coactive_features):
                images.update(exemplar["image"] for exemplar in row["exemplars"])
                rows.append(row)
                task.advance()
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA), row_group_size=ROWS_A_GROUP)
    return images


def write_images(
    folder: Path,
    survey: Survey,
    names: Sequence[str],
    classes: Sequence[str],
    shown: set[int],
    references: int,
    thumbnails: Album | None,
) -> None:
    """Write images.parquet, with the images `shown` in cards and the first `references` images, and the codes of the
    latter.

    names: of all exemplar images; classes: of their source, which may have none.
    """
    numbers = sorted(shown | set(range(references)))
    names_of_classes = [classes[int(survey.classes[number])] if classes else "" for number in numbers]
    table = {
        "image": pa.array(numbers, pa.int32()),
        "name": pa.array([names[number] for number in numbers], pa.string()),
        "class_name": pa.array(names_of_classes, pa.string()),
        "picture": pa.array([thumbnails.picture(n) if thumbnails else None for n in numbers], pa.binary()),
    }
    pq.write_table(pa.table(table), folder / IMAGES, compression="zstd", row_group_size=ROWS_A_GROUP)
    indices = survey.code_indices[:references].numpy()
    dtype = np.uint16 if survey.fires.shape[-1] <= 2**16 else np.int32
    values = survey.code_values[:references].numpy()
    np.savez_compressed(folder / REFERENCES, indices=indices.astype(dtype), values=values)


def _rows(
    survey: Survey,
    descriptions: FeatureDescriptions,
    words: Sequence[str],
    layer: int,
    count: int,
    shown: int,
    means: Album | None,
    coactive_features: list[list[CoactiveFeature]],
) -> Iterator[dict[str, Any]]:
    """The rows of a layer's first `count` features."""
    _, features = descriptions.reading.shape
    cls_frequencies = survey.fires[CLS, layer] / survey.exemplar_images
    patch_frequencies = survey.fires[PATCHES, layer] / (survey.exemplar_images * survey.masks.shape[-1])
    reading = descriptions.reading[layer]
    bins = survey.bins[:, layer].gather(0, reading[None, :, None].expand(1, -1, survey.bins.shape[-1]))[0]
    largest = descriptions.values[layer].abs().amax(-1)
    spread, counts = quantiles(bins, QUANTILES), histogram(bins, largest, BINS)
    written = descriptions.written
    for index in range(count):
        flat_index = layer * features + index
        fires = bool(largest[index] > 0)
        exemplars, scale = _exemplars(survey, descriptions, layer, index, shown)
        label = descriptions.label
        described = bool(descriptions.full[flat_index])
        writes = written.score[flat_index] >= descriptions.written_floor
        yield {
            "layer": layer,
            "index": index,
            "read_at": "cls" if reading[index] == CLS else "patches",
            "frequency_cls": float(cls_frequencies[index]),
            "frequency_patches": float(patch_frequencies[index]),
            "quantiles": spread[index].tolist() if fires else [],
            "largest": float(largest[index]),
            "histogram": counts[index].tolist() if fires else [],
            "exemplars": exemplars,
            "mask_scale": scale,
            "mean_picture": _mean(descriptions, layer, index, means),
            "label": words[label.word[flat_index]] if descriptions.labelled[flat_index] else None,
            "abstained": _abstained(descriptions, flat_index),
            "label_score": _number(label.score[flat_index]) if described else None,
            "label_margin": _number(label.margin[flat_index]) if described else None,
            "label_clarity": _number(descriptions.clarity[flat_index]) if described else None,
            "label_auroc": _number(descriptions.auroc[flat_index]) if descriptions.labelled[flat_index] else None,
            "writes": words[written.word[flat_index]] if writes else None,
            "writes_score": written.score[flat_index] if writes else None,
            "writes_margin": written.margin[flat_index] if writes else None,
            "coactive": [
                {"layer": other // features, "index": other % features, "jaccard": jaccard}
                for other, jaccard in coactive_features[flat_index]
            ],
        }


def _exemplars(
    survey: Survey, descriptions: FeatureDescriptions, layer: int, index: int, shown: int
) -> tuple[list[dict[str, Any]], float]:
    """(the first exemplars, the activation that 255 stands for in their masks: shared, so that they are comparable)."""
    masks = survey.masks[descriptions.reading[layer, index], layer, index, :shown].float()
    scale = float(masks.max()) or 1.0
    levels = (masks / scale * 255).round().byte().numpy()
    values, images = descriptions.values[layer, index], descriptions.exemplars[layer, index]
    exemplars = [
        {"image": int(images[at]), "activation": float(values[at]), "mask": levels[at].tobytes()}
        for at in range(min(shown, len(values)))
        if values[at] != 0
    ]
    return exemplars, scale


def _mean(descriptions: FeatureDescriptions, layer: int, index: int, album: Album | None) -> bytes | None:
    """Mean picture; None also for a feature with too few exemplars: the mean of one or two images would show them."""
    full = descriptions.full.reshape(descriptions.reading.shape)[layer, index]
    return album.mean(descriptions.exemplars[layer, index].numpy()) if album and full else None


def _abstained(descriptions: FeatureDescriptions, flat_index: int) -> Abstention | None:
    if descriptions.labelled[flat_index]:
        return None
    described = descriptions.full[flat_index] and not np.isnan(descriptions.label.score[flat_index])
    return "score" if described else "too_few_exemplars"


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
