"""Which texts are encoded together: of about the same length, and few enough that an image waits only briefly for them.

Images cannot interrupt the text encoder, so a group of texts is what delays them. It may take half as long as an image,
and at most `MOST_SECONDS`. How many tokens that are differs by model and machine a hundredfold, and is learnt from the
groups themselves, the first of them during warm-up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

MOST_SECONDS, LEAST_SECONDS = 0.03, 0.003  # of a group; below, it would cost more to hand it over
# Tokens in a group. Below the least, reading the weights takes longer than the products; the most bounds memory, and
# larger groups are no faster.
LEAST_TOKENS, MOST_TOKENS = 64, 4096
SHORT = 8  # tokens: what most labels have
MOST_PADDING = 0.25  # of the tokens in a group, unless they are few
GPU_TEXTS = (1, 4, 16, 64)  # texts in a group on a GPU, which plans again for each new shape
GPU_LENGTHS = (8, 16, 32, 64)  # and their lengths, besides the context


class TextGroups:
    """Divides texts into groups and pads each. Used by one thread at a time, but `divide` may run in another."""

    def __init__(self, context: int, pad: int, any_length: bool, on_gpu: bool) -> None:
        """context: most tokens of a text; pad: number of the padding token; any_length: whether the graph takes
        shorter ones (bundles of older versions and some towers do not)."""
        self._context, self._pad, self._on_gpu = context, pad, on_gpu
        lengths = [length for length in GPU_LENGTHS if length < context] if on_gpu else range(2, context)
        self._lengths = [*(lengths if any_length else ()), context]
        self.seconds = MOST_SECONDS  # that a group may take
        self.tokens = LEAST_TOKENS  # that it may have for that, with padding

    def divide(self, lengths: Sequence[int]) -> Iterator[NDArray[np.intp]]:
        """Indices of the texts of one group after another, shortest texts first; lengths: tokens of each text.

        The size of a group follows from the time that those before it took.
        """
        order = np.argsort(lengths, kind="stable")
        while len(order):
            size, alone = 1, self._padded(lengths[order[0]])
            while size < len(order):
                longest = self._padded(lengths[order[size]])
                alone += longest
                if not self._fits(size + 1, longest, alone):
                    break
                size += 1
            yield order[:size]
            order = order[size:]

    def _fits(self, texts: int, longest: int, alone: int) -> bool:
        """Whether so many texts are a group; alone: what they would be without padding to the longest, in tokens."""
        if self._on_gpu:
            return texts <= GPU_TEXTS[-1]
        tokens = texts * longest
        return tokens <= self.tokens and tokens - alone <= max(SHORT, alone * MOST_PADDING)

    def pad(self, texts: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Tokens [N, T] of texts, T as short as the graph takes it. On a GPU N is larger than the number of texts."""
        rows = next(size for size in GPU_TEXTS if size >= len(texts)) if self._on_gpu else len(texts)
        tokens = np.full((rows, self._padded(max(map(len, texts)))), self._pad, np.int64)
        for row, text in zip(tokens, texts, strict=False):
            row[: len(text)] = text
        return tokens

    def _padded(self, length: int) -> int:
        return next(padded for padded in self._lengths if padded >= length)

    def give_way_to(self, image_seconds: float) -> None:
        """Let groups take half of what an image takes, within limits."""
        self.seconds = min(max(image_seconds / 2, LEAST_SECONDS), MOST_SECONDS)

    def record(self, tokens: int, seconds: float) -> None:
        """Learn from a group of so many tokens, with padding, that took so long."""
        affordable = tokens * self.seconds / max(seconds, 1e-6)
        if affordable < self.tokens and tokens < self.tokens / 2 and seconds < self.seconds:
            return  # a small group takes longer by token: it says nothing of larger ones
        # By steps, as one measurement may have been disturbed.
        step = min(max(affordable / self.tokens, 0.5), 2.0)
        self.tokens = min(max(int(self.tokens * step), LEAST_TOKENS), MOST_TOKENS)

    def warm_up(self) -> Iterator[list[list[int]]]:
        """Groups to encode beforehand: on a GPU of every shape, else short and long ones, until the pace is known."""
        shortest, longest = self._lengths[0], self._context
        if self._on_gpu:
            shapes = [(texts, length) for texts in GPU_TEXTS for length in self._lengths]
            shapes.sort(key=lambda shape: shape not in ((1, shortest), (GPU_TEXTS[-1], longest)))
            # the smallest and the largest first: TensorRT then plans once for all between
            for texts, length in shapes:
                yield [[self._pad] * length] * texts
            return
        yield [[self._pad] * longest]
        short = self._padded(min(SHORT, longest))
        for _ in range(7):  # from 64 tokens to 4,096
            yield [[self._pad] * short] * max(1, self.tokens // short)
