"""Descriptions of all features, from the survey: where each is read, its label, and the label's reliability."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitrine.models.bundle.manifest import LabelQuality
from vitrine.training.cards import labels as naming
from vitrine.training.cards.labels import Labels, Written
from vitrine.training.cards.quality import aurocs, good_share, rank_images
from vitrine.training.cards.survey import CLS, PATCHES, Survey

Columns = TypeVar("Columns", Labels, Written)


@dataclass(frozen=True)
class FeatureDescriptions:
    """Descriptions of all n = L * F features, layer by layer; F as in the survey."""

    reading: Tensor  # [L, F] CLS, or PATCHES where it hardly ever fires at [CLS]
    exemplars: Tensor  # [L, F, K] image numbers
    values: Tensor  # [L, F, K] signed activations; 0: no exemplar
    label: Labels  # the best word of each feature
    clarity: NDArray[np.float64]  # [n] how far its exemplars agree
    full: NDArray[np.bool_]  # [n] whether it has K exemplars
    labelled: NDArray[np.bool_]  # [n] whether the best word reaches the threshold
    thresholds: tuple[float, float]  # minimum score by reading; infinity: no label was good enough
    auroc: NDArray[np.float64]  # [n] of the best word, on the half of the held-out images not used for calibration
    written: Written
    written_floor: float  # minimum score of the word that a direction writes
    quality: LabelQuality


def describe_features(
    survey: Survey, directions: Iterable[Tensor], fold: Tensor, words: Tensor, seed: int
) -> FeatureDescriptions:
    """directions: of features by layer [F, d], in a smaller layer fewer; fold [d, D]: of ln_post and the projection;
    words: embeddings from `training.cards.vocabulary.embed`."""
    exemplar_count = survey.values.shape[-1]
    reading = torch.where(survey.fires[CLS] < exemplar_count, PATCHES, CLS)
    pick = reading[None, ..., None].expand(1, -1, -1, exemplar_count)
    exemplars, values = (part.gather(0, pick)[0] for part in (survey.images.long(), survey.values))

    count = survey.exemplar_images
    centred = F.normalize(survey.embeddings - survey.embeddings[:count].mean(0), dim=-1)
    similarity = (centred @ words.T).numpy()
    ranks = rank_images(similarity[: len(survey.fired)])
    label = _by_layer(
        naming.describe(survey.fires_at(layer, of_layer, held_out=False).numpy(), ranks)
        for layer, of_layer in enumerate(reading)
    )
    check = _Check(survey, reading, similarity[count:])
    calibrating = check.auroc(label.word, 0)
    full = (values != 0).all(-1).flatten().numpy()
    labelled, thresholds = np.zeros_like(full), []
    for kind in (CLS, PATCHES):  # scores at patches and at [CLS] differ
        selected = full & (reading == kind).flatten().numpy()
        of_kind = Labels(*(part[selected] for part in label))
        thresholds.append(naming.calibrate(of_kind, calibrating[selected]))
        labelled |= selected & naming.given(label, thresholds[kind])

    reported = check.auroc(label.word, 1)
    shuffled = label.word.copy()
    shuffled[labelled] = np.random.default_rng(seed).permutation(shuffled[labelled])
    measured = labelled & ~np.isnan(reported)
    of_features = (F.pad(rows, (0, 0, 0, reading.shape[1] - len(rows))) for rows in directions)
    return FeatureDescriptions(
        reading=reading,
        exemplars=exemplars,
        values=values,
        label=label,
        clarity=np.concatenate(
            [
                naming.clarity(centred, of_layer.clamp_min(0), values[layer].abs())
                for layer, of_layer in enumerate(exemplars)
            ]
        ),
        full=full,
        labelled=labelled,
        thresholds=(thresholds[CLS], thresholds[PATCHES]),
        auroc=reported,
        written=_by_layer(naming.written(rows @ fold, words) for rows in of_features),
        written_floor=naming.written_floor(fold, words, seed),
        quality=LabelQuality(
            held_out_images=len(survey.fired_held_out[1::2]),
            labelled=int(labelled.sum()),
            measured=int(measured.sum()),
            auroc_share=good_share(reported[measured]),
            auroc_share_shuffled=good_share(check.auroc(shuffled, 1)[measured]),
        ),
    )


class _Check:
    """AUROC of words on the held-out images: the even ones (half 0) calibrate, the odd ones (half 1) report."""

    def __init__(self, survey: Survey, reading: Tensor, similarity: NDArray[np.float32]) -> None:
        """similarity [H, V]: of the held-out images and the words."""
        self.survey, self.reading = survey, reading
        self._ranks = [rank_images(similarity[half::2]) for half in (0, 1)]

    def auroc(self, words: NDArray[np.int64], half: int) -> NDArray[np.float64]:
        """AUROC of one word per feature, [n] -> [n]."""
        parts = []
        for layer, of_layer in enumerate(words.reshape(self.reading.shape)):
            fires = self.survey.fires_at(layer, self.reading[layer], held_out=True).numpy()[half::2]
            parts.append(aurocs(fires, self._ranks[half])[np.arange(len(of_layer)), of_layer])
        return np.concatenate(parts)


def _by_layer(parts: Iterable[Columns]) -> Columns:
    """Concatenate the named columns of all layers."""
    columns = list(parts)
    return type(columns[0])(*map(np.concatenate, zip(*columns, strict=True)))
