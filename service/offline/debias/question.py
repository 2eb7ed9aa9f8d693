"""What is asked: labels, the cue in words if there are any, how groups are found, and what an edit may cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.service.offline.debias.candidates import EDITS

By = Literal["table", "cue", "errors"]
AS_IT_IS = ("{}",)


class Encoder(Protocol):
    """What `LabelEncoder` is."""

    def encode(self, labels: Sequence[str], templates: Sequence[str], /) -> NDArray[np.float32]:
        """Unit embeddings [N, D]."""


@dataclass(frozen=True)
class Question:
    templates: tuple[str, ...]
    by: By
    cue: tuple[str, ...] = ()  # prompts: "a red background"
    others: tuple[str, ...] = ()  # of what is there instead: "a green background"
    joint: str = "{label} with {cue}"  # a prompt of both
    ops: tuple[str, ...] = EDITS  # that are tried
    cap: float = 0.01  # of the average accuracy: what an edit may cost
    draws: int = 5  # of random features
    shown: int = 10  # features of the ranking
    seed: int = 0


@dataclass(frozen=True)
class Texts:
    """Unit embeddings."""

    labels: Array  # [N, D]
    cue: Array  # [m, D]; none: no rows
    others: Array  # [k, D]; without prompts of what is there instead, the labels' own
    with_cue: Array  # [S, D] pairs of prompts of one label, with the cue
    without: Array  # [S, D] and without


def encode(encoder: Encoder, labels: tuple[str, ...], question: Question) -> Texts:
    """All texts that a question needs. Raises `EngineError`."""
    rows = encoder.encode(labels, question.templates)
    if not question.cue:
        none = rows[:0]
        return Texts(rows, none, none, none, none)
    cue = encoder.encode(question.cue, AS_IT_IS)
    others = encoder.encode(question.others, AS_IT_IS) if question.others else rows
    with_cue, without = [], []
    for label, plain in zip(labels, rows, strict=True):
        for each in question.cue:
            instead = [_joint(question.joint, label, other) for other in question.others]
            embeddings = encoder.encode([_joint(question.joint, label, each), *instead], question.templates)
            for other in embeddings[1:] if instead else [plain]:
                with_cue.append(embeddings[0])
                without.append(other)
    return Texts(rows, cue, others, np.stack(with_cue), np.stack(without))


def _joint(joint: str, label: str, cue: str) -> str:
    return joint.replace("{label}", label).replace("{cue}", cue)
