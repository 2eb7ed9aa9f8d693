"""From label texts to unit embeddings: templates filled in, encoded, averaged and renormalised as CLIP does; cached."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from cachetools import LRUCache, cached
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vitrine.models.bundle.bundle import Bundle, BundleError
from vitrine.models.bundle.label_sets import DEFAULT, NamedLabels
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.fit import TokenizerFile, check_tokenizer, check_unit
from vitrine.service.operations import metrics

# `tokenizers` would start a thread per processor of the machine, which the engine's threads then have to share.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PROMPTS_AT_ONCE, CHARS_AT_ONCE = 256, 16_384  # of texts that are tokenised, and then divided into groups, together
PROMPTS_PER_CALL = 32  # texts in one call of the tokenizer, which holds the interpreter's lock for part of its time


class Run(Protocol):
    """await run(function, *arguments, spent=...): call it in the engine's thread, when its turn comes. spent: what the
    same request has cost so far (`Batcher.run_between`)."""

    def __call__(self, function: Callable[..., Any], *args: Any, spent: float) -> Awaitable[Any]: ...


@dataclass(frozen=True)
class LabelSet:
    """Labels and their unit embeddings [N, D], in the same order."""

    labels: tuple[str, ...]
    embeddings: NDArray[np.float32]


_Key = tuple[tuple[str, ...], bytes]  # labels, digest of their templates


class LabelEncoder:
    """Label embeddings, cached by content: a label is encoded once per set of templates, across all requests.

    Must be used on the event loop. Texts are tokenised in another thread, for one request at a time; groups of them are
    encoded through the `run` passed to `resolve`. A request has one group in hand, so that requests take turns.
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        text = engine.bundle.manifest.text
        self.engine = engine
        self.reader = check_tokenizer(engine.bundle, _load_tokenizer(engine.bundle), engine.text)
        self.default_labels, self.default_templates = text.labels, text.templates
        self.named = {DEFAULT: NamedLabels.model_construct(labels=text.labels, templates=text.templates)}
        self._named_sets: dict[_Key, LabelSet] = {}  # never evicted
        for name, (named, embeddings) in engine.bundle.label_sets.items():
            self._store(self._register(name, named), embeddings)
        # Keyed by the templates' digest: large sets of templates must not be kept once per label.
        self._labels: LRUCache[tuple[str, bytes], NDArray[np.float32]] = LRUCache(capacity)
        self._sets: LRUCache[_Key, LabelSet] = LRUCache(capacity, getsizeof=lambda stored: len(stored.labels))
        # In hand; set when done with, whether it worked or not: who waited then looks again.
        self._sets_in_hand: dict[_Key, asyncio.Event] = {}
        self._labels_in_hand: dict[tuple[str, bytes], asyncio.Event] = {}
        self._tokenising = asyncio.Lock()

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
        """The label set; labels that are not cached are encoded in groups, by `await run(encode, texts, spent=...)`."""
        key = labels, _digest(templates)
        while (cached := self._named_sets.get(key) or self._sets.get(key)) is None:
            if (in_hand := self._sets_in_hand.get(key)) is None:
                break
            await in_hand.wait()  # of the same request's other images, or of another request
        else:
            metrics.LABELS.labels("cache").inc(len(labels))
            return cached
        done = self._sets_in_hand[key] = asyncio.Event()
        try:
            label_set = LabelSet(labels, await self._embeddings(labels, templates, key[1], run))
            if len(labels) <= self._sets.maxsize:
                self._sets[key] = label_set
        finally:
            del self._sets_in_hand[key]
            done.set()
        return label_set

    async def _embeddings(
        self, labels: Sequence[str], templates: Sequence[str], digest: bytes, run: Run
    ) -> NDArray[np.float32]:
        """Unit embeddings [N, D]."""
        places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
        embeddings = np.empty((len(places), self.engine.bundle.manifest.shape.embedding), np.float32)
        pending, spent, at_once = deque(places), 0, _at_once(places, templates)
        while pending:
            new: list[str] = []
            elsewhere: list[str] = []  # being encoded for another request
            while pending and len(new) < at_once:
                label = pending.popleft()
                if (embedding := self._labels.get((label, digest))) is not None:
                    embeddings[places[label]] = embedding
                    metrics.LABELS.labels("cache").inc()
                else:
                    (elsewhere if (label, digest) in self._labels_in_hand else new).append(label)
            pending.extend(elsewhere)
            if new:
                rows, spent = await self._encode_new(new, templates, digest, run, spent)
                embeddings[[places[label] for label in new]] = rows
            elif elsewhere:
                await self._labels_in_hand[elsewhere[0], digest].wait()
        return embeddings if len(places) == len(labels) else embeddings[[places[label] for label in labels]]

    async def _encode_new(
        self, labels: Sequence[str], templates: Sequence[str], digest: bytes, run: Run, spent: int
    ) -> tuple[NDArray[np.float32], int]:
        """(unit embeddings [N, D], spent and what these cost), and keep them in the cache."""
        metrics.LABELS.labels("encoder").inc(len(labels))
        done = asyncio.Event()
        self._labels_in_hand |= dict.fromkeys(((label, digest) for label in labels), done)
        try:
            async with self._tokenising:
                texts = await asyncio.to_thread(self._tokenise, labels, templates)
            prompts = self._empty(len(texts))
            for group in self.engine.text_groups.divide([len(text) for text in texts]):
                members = [texts[index] for index in group]
                prompts[group] = await run(self.engine.encode_texts, members, spent=spent)
                spent += len(members) * len(members[-1])
            rows = _average(prompts, len(templates))
            for label, row in zip(labels, rows, strict=True):
                self._labels[label, digest] = row.copy()  # a view would keep all rows in memory
        finally:
            for label in labels:
                del self._labels_in_hand[label, digest]
            done.set()
        return rows, spent

    def encode(self, labels: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
        """Unit embeddings [N, D], computed here and now: for use without a service."""
        texts = self._tokenise(labels, templates)
        prompts = self._empty(len(texts))
        for group in self.engine.text_groups.divide([len(text) for text in texts]):
            prompts[group] = self.engine.encode_texts([texts[index] for index in group])
        return _average(prompts, len(templates))

    def _tokenise(self, labels: Sequence[str], templates: Sequence[str]) -> list[list[int]]:
        """Tokens of every label in every template, label by label, each with its start and end."""
        texts: list[list[int]] = []
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        for start in range(0, len(prompts), PROMPTS_PER_CALL):
            texts += [tokens.ids for tokens in self.reader.read(prompts[start : start + PROMPTS_PER_CALL])]
        return texts

    def _empty(self, rows: int) -> NDArray[np.float32]:
        return np.empty((rows, self.engine.bundle.manifest.shape.embedding), np.float32)


def _at_once(labels: Iterable[str], templates: Sequence[str]) -> int:
    """How many labels are tokenised at once: some milliseconds of work."""
    longest = max(map(len, labels))
    chars = sum(len(template) + template.count("{}") * longest for template in templates)
    return max(1, min(PROMPTS_AT_ONCE // len(templates), CHARS_AT_ONCE // chars))


def _average(prompts: NDArray[np.float32], templates: int) -> NDArray[np.float32]:
    """Unit embeddings [labels, D] of unit embeddings [labels * templates, D]."""
    embeddings = prompts.reshape(-1, templates, prompts.shape[1]).mean(axis=1)
    return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def _digest(templates: tuple[str, ...]) -> bytes:
    return hashlib.sha256(json.dumps(templates).encode()).digest()


def _tokenizer_sha256(bundle: Bundle) -> str:
    return bundle.manifest.files["tokenizer.json"].sha256


@cached(LRUCache(1), key=_tokenizer_sha256, lock=threading.Lock())
def _load_tokenizer(bundle: Bundle) -> TokenizerFile:
    """The bundle's tokenizer. The last one is kept, for a bundle that has the same: to load one holds the GIL for 0.1 s
    and more, in any thread. So bundles may share it, and its padding and truncation must not be changed."""
    file = bundle.path / "tokenizer.json"
    with bundle.open("tokenizer.json") as stream:
        try:
            tokenizer = Tokenizer.from_buffer(stream.read())
        except (OSError, ValueError) as error:
            raise BundleError(f"{file} cannot be used: {error}") from error
    largest = max(tokenizer.get_vocab().values(), default=0)
    padding = tokenizer.padding
    tokenizer.no_padding()  # texts are padded by group
    return TokenizerFile(tokenizer, padding, tokenizer.truncation, largest)
