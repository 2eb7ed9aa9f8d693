"""From label texts to unit embeddings: templates filled in, encoded, averaged and renormalised as CLIP does; cached."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vitrine.models.bundle.bundle import BundleError
from vitrine.models.bundle.label_sets import DEFAULT, NamedLabels
from vitrine.service.engine.engine import Engine
from vitrine.service.operations import metrics

Run = Callable[..., Awaitable[Any]]  # await run(function, *arguments): the function, in some other thread

PROMPTS_A_CALL = 64  # texts encoded at once: small enough that images get their turn in between


@dataclass(frozen=True)
class LabelSet:
    """Labels and their unit embeddings [N, D], in the same order."""

    labels: tuple[str, ...]
    embeddings: NDArray[np.float32]


class LabelEncoder:
    """Label embeddings by content: the same label under the same templates is encoded once, whoever asks.

    Lives on the event loop; only `encode` runs elsewhere, through the `run` that `resolve` is given.
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        text = engine.bundle.manifest.text
        self.engine = engine
        self.tokenizer = _tokenizer(engine.bundle.path / "tokenizer.json")
        self.default_labels, self.default_templates = text.labels, text.templates
        self.named = {DEFAULT: NamedLabels.model_construct(labels=text.labels, templates=text.templates)}
        self._kept: dict[tuple[tuple[str, ...], bytes], LabelSet] = {}  # of named sets: never forgotten
        for name, (named, embeddings) in engine.bundle.label_sets.items():
            self._keep(self._name(name, named), embeddings)
        # By the templates' digest: many large sets of templates shall not be kept for many small labels.
        self._labels: LRUCache[tuple[str, bytes], NDArray[np.float32]] = LRUCache(capacity)
        self._sets: LRUCache[tuple[tuple[str, ...], bytes], LabelSet] = LRUCache(
            capacity, getsizeof=lambda stored: len(stored.labels)
        )
        self._encoding = asyncio.Lock()  # one group at a time, in turn: no label twice, and nobody waits for thousands

    async def add(self, label_sets: Mapping[str, NamedLabels], run: Run) -> None:
        """Take in named sets, in place of those of the same name, and encode them."""
        for name, given in label_sets.items():
            named = self._name(name, given)
            self._keep(named, (await self.resolve(*named, run)).embeddings)

    def _name(self, name: str, given: NamedLabels) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Make a set known by its name: (labels, templates), the bundle's templates where it has none of its own."""
        templates = given.templates or self.default_templates
        self.named[name] = NamedLabels.model_construct(labels=given.labels, templates=templates)
        return given.labels, templates

    def _keep(self, named: tuple[tuple[str, ...], tuple[str, ...]], embeddings: NDArray[np.floating]) -> None:
        labels, templates = named
        self._kept[labels, _digest(templates)] = LabelSet(labels, embeddings.astype(np.float32, copy=False))

    async def resolve(self, labels: tuple[str, ...], templates: tuple[str, ...], run: Run) -> LabelSet:
        """The label set; what is not cached is encoded a few labels at a time, by `await run(encode, ...)`."""
        digest = _digest(templates)
        if found := self._kept.get((labels, digest)) or self._sets.get((labels, digest)):
            metrics.LABELS.labels("cache").inc(len(labels))
            return found
        rows: dict[str, NDArray[np.float32]] = {}
        unknown = deque(dict.fromkeys(labels))
        while unknown:
            async with self._encoding:
                group: list[str] = []
                while unknown and len(group) < max(1, PROMPTS_A_CALL // len(templates)):
                    label = unknown.popleft()
                    known = self._labels.get((label, digest))  # of old, or encoded for another request meanwhile
                    if known is None:
                        group.append(label)
                    else:
                        rows[label] = known
                        metrics.LABELS.labels("cache").inc()
                if group:
                    metrics.LABELS.labels("encoder").inc(len(group))
                    for label, row in zip(group, await run(self.encode, group, templates), strict=True):
                        rows[label] = self._labels[label, digest] = row.copy()  # a view would keep the group
        made = LabelSet(labels, np.stack([rows[label] for label in labels]))
        if len(labels) <= self._sets.maxsize:
            self._sets[labels, digest] = made
        return made

    def encode(self, labels: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
        """Unit embeddings [N, D], by the text graph."""
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        tokens = np.array([encoding.ids for encoding in self.tokenizer.encode_batch(prompts)], dtype=np.int64)
        embeddings = self.engine.encode_text(tokens).reshape(len(labels), len(templates), -1).mean(axis=1)
        return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def _digest(templates: tuple[str, ...]) -> bytes:
    return hashlib.sha256(json.dumps(templates).encode()).digest()


def _tokenizer(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises nothing more special
        raise BundleError(f"{file} cannot be used: {error}") from error
