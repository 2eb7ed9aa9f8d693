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

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.manifest import LabelQuality
from vitrine.training.cards import labels as naming
from vitrine.training.cards.labels import Labels, Thresholds, Written
from vitrine.training.cards.quality import auroc, good_share, rank_images
from vitrine.training.cards.survey import CLS, PATCHES, Survey

Columns = TypeVar("Columns", Labels, Written)


@dataclass(frozen=True)
class FeatureDescriptions:
    """Descriptions of all n = L * F features, layer by layer."""

    reading: Tensor  # [L, F] CLS, or PATCHES where it hardly ever fires at [CLS]
    exemplars: Tensor  # [L, F, K] image numbers
    values: Tensor  # [L, F, K] signed activations; 0: no exemplar
    label: Labels  # the best word of each feature
    full: NDArray[np.bool_]  # [n] whether it has K exemplars
    labelled: NDArray[np.bool_]  # [n] whether the best word passes the thresholds
    thresholds: tuple[Thresholds, Thresholds]  # by reading
    auroc: NDArray[np.float64]  # [n] of the best word, on the half of the held-out images not used for calibration
    written: Written
    written_floor: float  # minimum score of the word that a direction writes
    quality: LabelQuality


def describe_features(survey: Survey, bundle: Bundle, words: Tensor, seed: int) -> FeatureDescriptions:
    """words: embeddings from `training.cards.vocabulary.embed`."""
    exemplar_count = survey.values.shape[-1]
    reading = torch.where(survey.fires[CLS] < exemplar_count, PATCHES, CLS)
    pick = reading[None, ..., None].expand(1, -1, -1, exemplar_count)
    exemplars, values = (part.gather(0, pick)[0] for part in (survey.images.long(), survey.values))
    weights = values.abs().flatten(0, 1)  # [n, K]
    full = (weights > 0).all(-1).numpy()

    count = survey.exemplar_images
    centred = F.normalize(survey.embeddings - survey.embeddings[:count].mean(0), dim=-1)
    label = _by_layer(
        naming.describe(centred, of_layer.clamp_min(0), values[layer].abs(), words)
        for layer, of_layer in enumerate(exemplars)
    )
    check = _Check(survey, reading, (centred[count:] @ words.T).numpy())
    calibrating = check.auroc(label.word, 0)
    labelled, thresholds = np.zeros_like(full), []
    for kind in (CLS, PATCHES):  # scores at patches and at [CLS] differ
        selected = full & (reading == kind).flatten().numpy()
        floor = naming.random_floor(centred[:count], weights[selected], words, seed)
        thresholds.append(naming.calibrate(Labels(*(part[selected] for part in label)), calibrating[selected], floor))
        labelled |= selected & thresholds[kind].passed(label)

    reported = check.auroc(label.word, 1)
    shuffled = label.word.copy()
    shuffled[labelled] = np.random.default_rng(seed).permutation(shuffled[labelled])
    measured = labelled & ~np.isnan(reported)
    fold = torch.from_numpy(bundle.fold.astype(np.float32))
    return FeatureDescriptions(
        reading=reading,
        exemplars=exemplars,
        values=values,
        label=label,
        full=full,
        labelled=labelled,
        thresholds=(thresholds[CLS], thresholds[PATCHES]),
        auroc=reported,
        written=_by_layer(
            naming.written(torch.from_numpy(np.array(rows, np.float32)) @ fold, words) for rows in bundle.directions
        ),
        written_floor=naming.written_floor(fold, words, seed),
        quality=LabelQuality(
            held_out_images=len(survey.held_out[1::2]),
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
        of_layer = words.reshape(self.reading.shape)
        return np.concatenate(
            [auroc(self._fires(layer)[half::2], self._ranks[half], word) for layer, word in enumerate(of_layer)]
        )

    def _fires(self, layer: int) -> NDArray[np.bool_]:
        """On which images each feature fires at its reading [H, F]."""
        cls, patches = (self.survey.fires_held_out(kind, layer) for kind in (CLS, PATCHES))
        return torch.where(self.reading[layer] == CLS, cls, patches).numpy()


def _by_layer(parts: Iterable[Columns]) -> Columns:
    """Concatenate the named columns of all layers."""
    columns = list(parts)
    return type(columns[0])(*map(np.concatenate, zip(*columns, strict=True)))
