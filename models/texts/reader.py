"""From texts to tokens, as a bundle's CLIP reads them: cleaning, then tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from vitrine.models.texts.clean import Clean, clean


class Tokens(NamedTuple):
    """A text's tokens, with those for its start and end."""

    ids: list[int]
    is_cut: bool  # the text has more than the CLIP takes; the last are left out


class TextReader:
    """Tokens of texts. Thread-safe, as `tokenizers` is."""

    def __init__(
        self, tokenizer: Tokenizer, how: Clean | None = None, written: Sequence[str] = (), zeroed: int | None = None
    ) -> None:
        """
        Args:
            tokenizer: cuts texts to the CLIP's context, and does not pad them.
            how: they are cleaned first; None: the tokenizer does it, as in bundles of older versions.
            written: special tokens that count as such where they stand in a text as a piece of their own
                (`SimpleTokenizer` of open_clip; other tokenizers recognise theirs themselves).
            zeroed: a token that open_clip replaces by 0 (`strip_sep_token`).

        Raises:
            ValueError: the tokenizer does not cut texts, or cannot tell what is in `written` from the rest of a text.
        """
        if (truncation := tokenizer.truncation) is None:
            raise ValueError("the tokenizer does not cut texts")
        self.context = int(truncation["max_length"])  # most tokens of a text
        self._tokenizer, self._how, self._zeroed = tokenizer, how, zeroed
        self._written: dict[str, int] = {}
        if written:
            self._ends = tokenizer.encode("").ids
            if len(self._ends) != 2 or tokenizer.pre_tokenizer is None:
                raise ValueError("the tokenizer does not divide texts into pieces between two special tokens")
        for token in written:
            if (number := tokenizer.token_to_id(token)) is None:
                raise ValueError(f"{token[:100]!r} is no token of the tokenizer's")
            self._written[token] = number

    def read(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text."""
        if self._how is not None:
            texts = [clean(text, self._how) for text in texts]
        tokens = []
        for text, encoding in zip(texts, self._tokenizer.encode_batch_fast(texts), strict=True):
            if any(token in text for token in self._written):
                tokens.append(self._piece_by_piece(text))
                continue
            ids = encoding.ids
            tokens.append(Tokens(ids, len(ids) == self.context and bool(encoding.overflowing)))
        if self._zeroed is not None:
            tokens = [
                Tokens([0 if token == self._zeroed else token for token in ids], is_cut) for ids, is_cut in tokens
            ]
        return tokens

    def _piece_by_piece(self, text: str) -> Tokens:
        """The same for a text with a special token in it, which is one where it is a piece, not within one ("!<…>")."""
        start, end = self._ends
        ids = [start]
        for piece, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text):
            if piece in self._written:
                ids.append(self._written[piece])
            else:
                ids += [token.id for token in self._tokenizer.model.tokenize(piece)]
        ids.append(end)
        if len(ids) <= self.context:
            return Tokens(ids, is_cut=False)
        return Tokens([*ids[: self.context - 1], end], is_cut=True)
