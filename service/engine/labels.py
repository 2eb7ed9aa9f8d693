"""From label texts to unit embeddings: templates filled in, encoded, averaged and renormalised as CLIP does; cached."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from cachetools import LRUCache, cached
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vitrine.models.bundle.bundle import Bundle, BundleError
from vitrine.models.bundle.label_sets import DEFAULT, NamedLabels
from vitrine.models.texts.labels import (
    LabelNotice,
    LabelReading,
    label_notices,
    label_readings,
    label_texts,
    notices_of,
)
from vitrine.models.texts.reader import TextReader, Tokens
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.fit import TokenizerFile, check_tokenizer, check_unit
from vitrine.service.operations import metrics

# `tokenizers` would start a thread per processor of the machine, which the engine's threads then have to share.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PROMPTS_AT_ONCE, CHARS_AT_ONCE = 256, 16_384  # of texts that are tokenised, and then divided into groups, together
HARD = 16  # how much longer a text may take that has HTML entities, and entities within these


class Run(Protocol):
    """await run(function, *arguments, spent=...): call it in the engine's thread, when its turn comes. spent: what the
    same request has cost so far (`Batcher.run_between`)."""

    def __call__(self, function: Callable[..., Any], *args: Any, spent: float) -> Awaitable[Any]: ...


@dataclass(frozen=True)
class LabelSet:
    """Labels and their unit embeddings [N, D], in the same order."""

    labels: tuple[str, ...]
    embeddings: NDArray[np.float32]
    notices: tuple[LabelNotice, ...] = ()  # what there is to say of them


class _Kept(NamedTuple):
    embedding: NDArray[np.float32]
    reading: LabelReading


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
        self._unread: set[_Key] = set()  # of these, sets whose texts nobody has read: they came with their embeddings
        for name, (named, embeddings) in engine.bundle.label_sets.items():
            self._unread.add(self._store(self._register(name, named), embeddings))
        # Keyed by the templates' digest: large sets of templates must not be kept once per label.
        self._labels: LRUCache[tuple[str, bytes], _Kept] = LRUCache(capacity)
        self._sets: LRUCache[_Key, LabelSet] = LRUCache(capacity, getsizeof=lambda stored: len(stored.labels))
        # In hand; set when done with, whether it worked or not: who waited then looks again.
        self._sets_in_hand: dict[_Key, asyncio.Event] = {}
        self._labels_in_hand: dict[tuple[str, bytes], asyncio.Event] = {}
        self._tokenising = asyncio.Lock()

    async def add(self, label_sets: Mapping[str, NamedLabels], run: Run) -> None:
        """Add named sets, replacing those of the same name, and encode them."""
        for name, definition in label_sets.items():
            named = self._register(name, definition)
            label_set = await self.resolve(*named, run)
            self._store(named, label_set.embeddings, label_set.notices)

    def _register(self, name: str, label_set: NamedLabels) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Register a set by its name: (labels, templates), with the bundle's templates if it has none of its own."""
        templates = label_set.templates or self.default_templates
        self.named[name] = NamedLabels.model_construct(labels=label_set.labels, templates=templates)
        return label_set.labels, templates

    def _store(
        self,
        named: tuple[tuple[str, ...], tuple[str, ...]],
        embeddings: NDArray[np.floating],
        notices: tuple[LabelNotice, ...] = (),
    ) -> _Key:
        labels, templates = named
        check_unit(
            embeddings,
            f"{self.engine.bundle.path}: the embedding of the label {labels[0]!r}, or of another label of its set,",
        )
        key = labels, _digest(templates)
        self._named_sets[key] = LabelSet(labels, embeddings.astype(np.float32, copy=False), notices)
        return key

    async def resolve(self, labels: tuple[str, ...], templates: tuple[str, ...], run: Run) -> LabelSet:
        """The label set; labels that are not cached are encoded in groups, by `await run(encode, texts, spent=...)`."""
        key = labels, _digest(templates)
        while (cached := self._named_sets.get(key) or self._sets.get(key)) is None:
            if (in_hand := self._sets_in_hand.get(key)) is None:
                break
            await in_hand.wait()  # of the same request's other images, or of another request
        else:
            metrics.LABELS.labels("cache").inc(len(labels))
            return await self._read_set(key, templates) if key in self._unread else cached
        done = self._sets_in_hand[key] = asyncio.Event()
        try:
            embeddings, readings = await self._embeddings(labels, templates, key[1], run)
            label_set = LabelSet(labels, embeddings, label_notices(labels, readings, self.reader.context))
            if len(labels) <= self._sets.maxsize:
                self._sets[key] = label_set
        finally:
            del self._sets_in_hand[key]
            done.set()
        return label_set

    async def _embeddings(
        self, labels: Sequence[str], templates: Sequence[str], digest: bytes, run: Run
    ) -> tuple[NDArray[np.float32], list[LabelReading]]:
        """(unit embeddings [N, D], what is read of each label)."""
        places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
        embeddings = np.empty((len(places), self.engine.bundle.manifest.shape.embedding), np.float32)
        readings: dict[str, LabelReading] = {}
        pending, spent, at_once = deque(places), 0, _at_once(places, templates)
        while pending:
            new: list[str] = []
            elsewhere: list[str] = []  # being encoded for another request
            while pending and len(new) < at_once:
                label = pending.popleft()
                if (kept := self._labels.get((label, digest))) is not None:
                    embeddings[places[label]], readings[label] = kept
                    metrics.LABELS.labels("cache").inc()
                else:
                    (elsewhere if (label, digest) in self._labels_in_hand else new).append(label)
            pending.extend(elsewhere)
            if new:
                rows, new_readings, spent = await self._encode_new(new, templates, digest, run, spent)
                embeddings[[places[label] for label in new]] = rows
                readings |= zip(new, new_readings, strict=True)
            elif elsewhere:
                await self._labels_in_hand[elsewhere[0], digest].wait()
        if len(places) < len(labels):
            embeddings = embeddings[[places[label] for label in labels]]
        return embeddings, [readings[label] for label in labels]

    async def _encode_new(
        self, labels: Sequence[str], templates: Sequence[str], digest: bytes, run: Run, spent: int
    ) -> tuple[NDArray[np.float32], list[LabelReading], int]:
        """(unit embeddings [N, D], what is read of the labels, spent and what these cost); kept in the cache."""
        metrics.LABELS.labels("encoder").inc(len(labels))
        done = asyncio.Event()
        self._labels_in_hand |= dict.fromkeys(((label, digest) for label in labels), done)
        try:
            texts, readings = await self._read(labels, templates)
            prompts = self._empty(len(texts))
            for group in self.engine.text_groups.divide([len(text) for text in texts]):
                members = [texts[index] for index in group]
                prompts[group] = await run(self.engine.encode_texts, members, spent=spent)
                spent += len(members) * len(members[-1])
            rows = _average(prompts, len(templates))
            for label, row, reading in zip(labels, rows, readings, strict=True):
                self._labels[label, digest] = _Kept(row.copy(), reading)  # a view would keep all rows in memory
        finally:
            for label in labels:
                del self._labels_in_hand[label, digest]
            done.set()
        return rows, readings, spent

    async def notices(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> tuple[LabelNotice, ...]:
        """What there is to say of labels; none is encoded for it."""
        key = labels, _digest(templates)
        if key not in self._unread and (cached := self._named_sets.get(key) or self._sets.get(key)) is not None:
            return cached.notices
        cache = {label: kept.reading for label in labels if (kept := self._labels.get((label, key[1]))) is not None}
        new, at_once = [label for label in dict.fromkeys(labels) if label not in cache], _at_once(labels, templates)
        for start in range(0, len(new), at_once):
            some = new[start : start + at_once]
            _, readings = await self._read(some, templates)
            cache |= zip(some, readings, strict=True)
        return label_notices(labels, [cache[label] for label in labels], self.reader.context)

    async def _read_set(self, key: _Key, templates: tuple[str, ...]) -> LabelSet:
        """A set that the bundle brought with its embeddings, once its texts have been read, too."""
        notices = await self.notices(key[0], templates)
        self._unread.discard(key)
        self._named_sets[key] = replace(self._named_sets[key], notices=notices)
        return self._named_sets[key]

    async def count_tokens(self, texts: Sequence[str]) -> int:
        """How many tokens the CLIP reads of texts, each with its start and end."""
        return sum(len(ids) for ids, _ in await self._tokens(texts))

    def encode(self, labels: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
        """Unit embeddings [N, D], computed here and now: for use without a service."""
        return self.label_set(labels, templates).embeddings

    def label_set(self, labels: Sequence[str], templates: Sequence[str]) -> LabelSet:
        """The same, with what there is to say of the labels."""
        texts, readings = label_readings(self.reader, self.reader.read(label_texts(labels, templates)), templates)
        prompts = self._empty(len(texts))
        for group in self.engine.text_groups.divide([len(text) for text in texts]):
            prompts[group] = self.engine.encode_texts([texts[index] for index in group])
        notices = label_notices(labels, readings, self.reader.context)
        return LabelSet(tuple(labels), _average(prompts, len(templates)), notices)

    async def _read(
        self, labels: Sequence[str], templates: Sequence[str]
    ) -> tuple[list[list[int]], list[LabelReading]]:
        """`label_readings`, a piece of the work at a time: other requests take turns."""
        tokens = await self._tokens(label_texts(labels, templates))
        return label_readings(self.reader, tokens, templates)

    async def _tokens(self, texts: Sequence[str]) -> list[Tokens]:
        tokens: list[Tokens] = []
        for piece in _pieces(texts):
            async with self._tokenising:
                tokens += await asyncio.to_thread(self.reader.read, piece)
        return tokens

    def _empty(self, rows: int) -> NDArray[np.float32]:
        return np.empty((rows, self.engine.bundle.manifest.shape.embedding), np.float32)


def _at_once(labels: Iterable[str], templates: Sequence[str]) -> int:
    """How many labels are tokenised at once: some milliseconds of work."""
    longest = max(map(len, labels))
    chars = sum(len(template) + template.count("{}") * longest for template in templates)
    return max(1, min(PROMPTS_AT_ONCE // len(templates), CHARS_AT_ONCE // chars))


def _pieces(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Texts that are read in one go: some milliseconds of work, mostly."""
    start, work = 0, 0
    for place, text in enumerate(texts):
        cost = len(text) * (HARD if "&" in text else 1)
        if work and work + cost > CHARS_AT_ONCE:
            yield texts[start:place]
            start, work = place, 0
        work += cost
    yield texts[start:]


def _average(prompts: NDArray[np.float32], templates: int) -> NDArray[np.float32]:
    """Unit embeddings [labels, D] of unit embeddings [labels * templates, D]."""
    embeddings = prompts.reshape(-1, templates, prompts.shape[1]).mean(axis=1)
    return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def _digest(templates: tuple[str, ...]) -> bytes:
    return hashlib.sha256(json.dumps(templates).encode()).digest()


def bundle_notices(bundle: Bundle, labels: Sequence[str], templates: Sequence[str]) -> tuple[LabelNotice, ...]:
    """What there is to say of labels, from the bundle alone. Raises `BundleError`."""
    text = bundle.manifest.text
    try:
        reader = TextReader(_load_tokenizer(bundle).tokenizer, text.clean, text.written, text.zeroed)
    except ValueError as error:
        raise BundleError(f"{bundle.path / 'tokenizer.json'} cannot be used: {error}") from error
    return notices_of(reader, labels, templates)


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
