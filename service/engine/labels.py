"""From label texts to unit embeddings: templates filled in, encoded, averaged and renormalised as CLIP does; cached."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cachetools import LRUCache, cached
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vitrine.models.bundle.bundle import Bundle, BundleError
from vitrine.models.bundle.label_sets import DEFAULT, NamedLabels
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.fit import Tokens, check_tokenizer, check_unit
from vitrine.service.operations import metrics

Run = Callable[..., Awaitable[Any]]  # await run(function, *arguments): call it in another thread

PROMPTS_PER_CALL = 64  # texts per encoder call: few enough that images are processed in between


@dataclass(frozen=True)
class LabelSet:
    """Labels and their unit embeddings [N, D], in the same order."""

    labels: tuple[str, ...]
    embeddings: NDArray[np.float32]


class LabelEncoder:
    """Label embeddings, cached by content: a label is encoded once per set of templates, across all requests.

    Must be used on the event loop; only `encode` runs elsewhere, through the `run` passed to `resolve`.
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        text = engine.bundle.manifest.text
        self.engine = engine
        tokens = _load_tokenizer(engine.bundle)
        check_tokenizer(engine.bundle, tokens, engine.text)
        self.tokenizer = tokens.tokenizer
        self.default_labels, self.default_templates = text.labels, text.templates
        self.named = {DEFAULT: NamedLabels.model_construct(labels=text.labels, templates=text.templates)}
        self._named_sets: dict[tuple[tuple[str, ...], bytes], LabelSet] = {}  # never evicted
        for name, (named, embeddings) in engine.bundle.label_sets.items():
            self._store(self._register(name, named), embeddings)
        # Keyed by the templates' digest: large sets of templates must not be kept once per label.
        self._labels: LRUCache[tuple[str, bytes], NDArray[np.float32]] = LRUCache(capacity)
        self._sets: LRUCache[tuple[tuple[str, ...], bytes], LabelSet] = LRUCache(
            capacity, getsizeof=lambda stored: len(stored.labels)
        )
        self._encoding = asyncio.Lock()  # a group at a time: no label is encoded twice, no request waits for thousands

    async def add(self, label_sets: Mapping[str, NamedLabels], run: Run) -> None:
        """Add named sets, replacing those of the same name, and encode them."""
        for name, label_set in label_sets.items():
            named = self._register(name, label_set)
            self._store(named, (await self.resolve(*named, run)).embeddings)

    def _register(self, name: str, label_set: NamedLabels) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Register a set by its name: (labels, templates), with the bundle's templates if it has none of its own."""
        templates = label_set.templates or self.default_templates
        self.named[name] = NamedLabels.model_construct(labels=label_set.labels, templates=templates)
        return label_set.labels, templates

    def _store(self, named: tuple[tuple[str, ...], tuple[str, ...]], embeddings: NDArray[np.floating]) -> None:
        labels, templates = named
        check_unit(embeddings, f"{self.engine.bundle.path}: the embedding of a label, {labels[0]!r} or one of its set,")
        self._named_sets[labels, _digest(templates)] = LabelSet(labels, embeddings.astype(np.float32, copy=False))

    async def resolve(self, labels: tuple[str, ...], templates: tuple[str, ...], run: Run) -> LabelSet:
        """The label set; labels that are not cached are encoded a few at a time, by `await run(encode, ...)`."""
        digest = _digest(templates)
        if cached := self._named_sets.get((labels, digest)) or self._sets.get((labels, digest)):
            metrics.LABELS.labels("cache").inc(len(labels))
            return cached
        rows: dict[str, NDArray[np.float32]] = {}
        pending = deque(dict.fromkeys(labels))
        while pending:
            async with self._encoding:
                group: list[str] = []
                while pending and len(group) < max(1, PROMPTS_PER_CALL // len(templates)):
                    label = pending.popleft()
                    embedding = self._labels.get((label, digest))  # maybe encoded for another request meanwhile
                    if embedding is None:
                        group.append(label)
                    else:
                        rows[label] = embedding
                        metrics.LABELS.labels("cache").inc()
                if group:
                    metrics.LABELS.labels("encoder").inc(len(group))
                    for label, row in zip(group, await run(self.encode, group, templates), strict=True):
                        rows[label] = self._labels[label, digest] = row.copy()  # a view would keep the group
        label_set = LabelSet(labels, np.stack([rows[label] for label in labels]))
        if len(labels) <= self._sets.maxsize:
            self._sets[labels, digest] = label_set
        return label_set

    def encode(self, labels: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
        """Unit embeddings [N, D], by the text graph."""
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        tokens = np.array([encoding.ids for encoding in self.tokenizer.encode_batch(prompts)], dtype=np.int64)
        embeddings = self.engine.encode_text(tokens).reshape(len(labels), len(templates), -1).mean(axis=1)
        return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def _digest(templates: tuple[str, ...]) -> bytes:
    return hashlib.sha256(json.dumps(templates).encode()).digest()


def _tokenizer_sha256(bundle: Bundle) -> str:
    return bundle.manifest.files["tokenizer.json"].sha256


@cached(LRUCache(1), key=_tokenizer_sha256, lock=threading.Lock())
def _load_tokenizer(bundle: Bundle) -> Tokens:
    """The bundle's tokenizer. The last one is kept, for a bundle that has the same: to load one holds the GIL for 0.1 s
    and more, in any thread. So bundles may share it, and its padding and truncation must not be changed."""
    file = bundle.path / "tokenizer.json"
    with bundle.open("tokenizer.json") as stream:
        try:
            tokenizer = Tokenizer.from_buffer(stream.read())
        except (OSError, ValueError) as error:
            raise BundleError(f"{file} cannot be used: {error}") from error
    largest = max(tokenizer.get_vocab().values(), default=0)
    return Tokens(tokenizer, tokenizer.padding, tokenizer.truncation, largest)
