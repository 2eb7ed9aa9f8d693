"""From texts to tokens, as a bundle's CLIP reads them: cleaning, then tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from vitrine.models.texts.clean import Clean, clean

_NO_CHARACTER = "\ufffd\u2581"  # bytes that are none; SentencePiece's sign for a blank
TEXTS_PER_CALL = 32  # of the tokenizer, which holds the interpreter's lock for part of its time


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
        self._ends = tokenizer.encode("").ids  # what every text has
        if written and (len(self._ends) != 2 or tokenizer.pre_tokenizer is None):
            raise ValueError("the tokenizer does not split texts into pieces between two special tokens")
        for token in written:
            if (number := tokenizer.token_to_id(token)) is None:
                raise ValueError(f"{token[:100]!r} is not a token of the tokenizer")
            self._written[token] = number
        added = (number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
        self._special = {*self._ends, *self._written.values(), *added, unknown, zeroed}
        self._end_of_word = getattr(tokenizer.model, "end_of_word_suffix", None) or ""

    def read(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text."""
        tokens: list[Tokens] = []
        for start in range(0, len(texts), TEXTS_PER_CALL):
            tokens += self._read(texts[start : start + TEXTS_PER_CALL])
        return tokens

    def _read(self, texts: Sequence[str]) -> list[Tokens]:
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

    def means_nothing(self, ids: Sequence[int]) -> bool:
        """Whether a text has no token with a whole character in it that can be seen.

        Special tokens have none, nor has the one for what is not in the vocabulary, nor a single byte of a character
        that the vocabulary does not have as a whole: so CLIP's spells most of Chinese. Letters that it
        has do not yet make a word that the CLIP has learnt: of those nothing is said.
        """
        return all(self._is_blank(token) for token in ids)

    def _is_blank(self, token: int) -> bool:
        if token in self._special or (text := self._tokenizer.id_to_token(token)) is None:
            return True
        text = text.removesuffix(self._end_of_word)
        if (decoder := self._tokenizer.decoder) is not None:
            text = decoder.decode([text])
        return all(c.isspace() or not c.isprintable() or c in _NO_CHARACTER for c in text)
