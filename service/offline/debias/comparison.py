"""What is done about a cue, on the held-out half: nothing, the edit, and what others would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.models.groups import Judge
from vitrine.service.offline.debias.projections import calibrated, orthogonal, projected
from vitrine.service.offline.debias.question import Question, Texts
from vitrine.service.offline.debias.report import Method

ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class Comparison:
    """Predictions of the held-out half's images [n], each under one method."""

    judge: Judge
    before: NDArray[np.integer]

    def method(self, name: str, what: str, predicted: NDArray[np.integer]) -> Method:
        change = None if name == ZERO_SHOT else self.judge.change(self.before, predicted)
        return Method(name=name, what=what, accuracy=self.judge.accuracy(predicted), change=change)

    def zero_shot(self) -> Method:
        return self.method(ZERO_SHOT, "the unmodified bundle", self.before)

    def projections(self, embeddings: Array, texts: Texts, question: Question) -> list[Method]:
        """Orth-Proj and Orth-Cali, of the images' plain embeddings [n, D]; there must be prompts of the cue."""
        projection = orthogonal(texts.cue)
        also = calibrated(projection, texts.with_cue, texts.without)
        prompts = "; ".join(question.cue)
        return [
            self.method(name, f"{what}: {prompts}", predicted(embeddings, projected(texts.labels, matrix)))
            for name, what, matrix in (
                ("Orth-Proj", "labels with the direction of the cue's prompts projected out", projection),
                (
                    "Orth-Cali",
                    "labels with the direction of the cue's prompts projected out, calibrated by pairs",
                    also,
                ),
            )
        ]

    def random(self, name: str, predicted: Sequence[NDArray[np.integer]]) -> list[Method]:
        """Of several draws the one with the best worst group."""
        methods = [self.method(name, f"the best of {len(predicted)} draws", one) for one in predicted]
        return [max(methods, key=lambda method: method.accuracy.worst.value)] if methods else []


def predicted(embeddings: Array, labels: Array) -> NDArray[np.integer]:
    """[n] the label [N, D] nearest to each unit embedding [n, D]."""
    return (embeddings @ labels.T).argmax(-1)
