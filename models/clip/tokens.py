"""open_clip's tokenizers as Hugging Face `tokenizers`, so that the service needs neither torch nor open_clip.

open_clip cleans a text before it splits it. The converted tokenizer does not: `models.texts` does, in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import regex
from open_clip import tokenizer as open_clip_tokenizers
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from vitrine.models.errors import VitrineError
from vitrine.models.texts.clean import Clean
from vitrine.models.texts.reader import TextReader

# Each is read differently by a tokenizer that leaves out one of open_clip's steps.
CHECKED_TEXTS = (
    "a photo of a cat",
    "Two  DOGS, one frisbee!",
    "it's the neighbour's car; they'll've gone, 'ſ 'S",
    "naïve façade, Ænima, Straße, İstanbul",
    "猫 и собака",
    "emoji 🐈 123 4.5% ²³ Ⅻ ①",
    "“don’t” walk",
    "cafe\u0301 \u0345 \u0915\u094d\u0937",
    "a-b_c/d (e) [f] {g}",
    "Ben &amp; Jerry &amp;amp; &lt;b&gt; &#x1f408;",
    "< &amp;amp;lt; &amp;amp;amp;",
    "ＣＡＴ ｶﾀｶﾅ ﬁsh",
    "schÃ¶n, it’s",
    "<end_of_text> a<start_of_text>!<end_of_text> <END_OF_TEXT> [SEP] </s>",
    "\0 \x1b[31mred\x1b[0m \x85 \u2028 \ud83d\ude00 \ud800",
    "word " * 200,
    "x" * 2000,
    "",
)
_PIECES = r"""|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""  # of `SimpleTokenizer`, after its tokens


class TokenizerMismatch(VitrineError):
    """The converted tokenizer and open_clip's give different tokens for a text; the message shows both."""


class UnsupportedTokenizer(VitrineError, TypeError):
    """A tokenizer that cannot be converted; the message names it, or the option that makes it so."""


@dataclass(frozen=True)
class Converted:
    """A tokenizer for the `tokenizers` library, with truncation and padding, and what has to be done besides."""

    tokenizer: Tokenizer
    pad: int  # id of the padding token
    clean: Clean
    written: tuple[str, ...] = ()  # `TextReader`
    zeroed: int | None = None  # `TextReader`

    def reader(self) -> TextReader:
        """What reads texts as the service will."""
        unpadded = Tokenizer.from_str(self.tokenizer.to_str())
        unpadded.no_padding()
        return TextReader(unpadded, self.clean, self.written, self.zeroed)


def convert_tokenizer(tokenizer: Any) -> Converted:
    """The same tokenizer for the `tokenizers` library.

    Raises `UnsupportedTokenizer` for a type of tokenizer that open_clip's CLIP models do not use, and for options that
    cannot be reproduced.
    """
    if isinstance(tokenizer, SimpleTokenizer):
        converted = _simple(tokenizer)
    elif isinstance(tokenizer, HFTokenizer):
        converted = _hugging_face(tokenizer)
    else:
        raise UnsupportedTokenizer(f"cannot convert a tokenizer of type {type(tokenizer).__name__}")
    converted.tokenizer.enable_truncation(tokenizer.context_length)
    converted.tokenizer.enable_padding(length=tokenizer.context_length, pad_id=converted.pad)
    return converted


def check_tokenizer(tokenizer: Any, converted: Converted, texts: list[str]) -> None:
    """Raise `TokenizerMismatch` unless both give the same tokens for `texts` and `CHECKED_TEXTS`."""
    reader = converted.reader()
    for text in [*texts, *CHECKED_TEXTS]:
        expected = tokenizer([text])[0].tolist()
        (tokens,) = reader.read([text])
        actual = tokens.ids + [converted.pad] * (tokenizer.context_length - len(tokens.ids))
        if actual != expected:
            raise TokenizerMismatch(f"tokens of {text!r}: open_clip {expected}, exported {actual}")


def _cleaning(function: Any) -> Clean:
    names: tuple[Clean, ...] = ("lower", "whitespace", "canonicalize")
    for name in names:
        if function is open_clip_tokenizers.get_clean_fn(name):
            return name
    raise UnsupportedTokenizer(f"cannot convert a tokenizer that cleans texts by {function!r}; known: {names}")


def _simple(tokenizer: SimpleTokenizer) -> Converted:
    """CLIP's byte-pair encoding with `</w>` at the end of words."""
    if tokenizer.reduction_fn is not None:
        raise UnsupportedTokenizer(
            "cannot convert a tokenizer with a reduction_mask, which leaves out tokens at random"
        )
    start, end, *more = (tokenizer.decoder[number] for number in tokenizer.all_special_ids)
    if more:
        raise UnsupportedTokenizer(f"cannot convert a tokenizer with additional_special_tokens: {', '.join(more)}")
    if tokenizer.pat.pattern != f"{start}|{end}{_PIECES}":
        raise UnsupportedTokenizer(f"cannot convert a tokenizer that splits texts by {tokenizer.pat.pattern!r}")
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    converted = Tokenizer(models.BPE(vocab=tokenizer.encoder, merges=merges, end_of_word_suffix="</w>"))
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_explicit_pieces(start, end)), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    numbers = {start: tokenizer.sot_token_id, end: tokenizer.eot_token_id}
    converted.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=list(numbers.items())
    )
    converted.decoder = decoders.ByteLevel()
    return Converted(converted, 0, _cleaning(tokenizer.clean_fn), (start, end))


@cache
def _explicit_pieces(*special: str) -> str:
    """`SimpleTokenizer`'s pattern with every class written out as code points.

    It is matched by the `regex` module, whatever the case: "'ſ" is "'s", and U+0345 is neither a letter nor anything
    else. `tokenizers` matches by another library, of another version of Unicode.
    """
    words = [*special, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
    letters, numbers, others = (_code_points(kind) for kind in (r"\p{L}", r"\p{N}", r"^\s\p{L}\p{N}"))
    literal = ("".join(f"[{_code_points(regex.escape(letter))}]" for letter in word) for word in words)
    return "|".join([*literal, f"[{letters}]+", f"[{numbers}]", f"[{others}]+"])


def _code_points(kind: str) -> str:
    r"""Ranges `\x{…}-\x{…}` of the characters that the class [kind] matches, whatever the case."""
    pattern, ranges = regex.compile(f"[{kind}]+", regex.IGNORECASE), []
    for first, characters in _all_characters():
        for run in pattern.finditer(characters):
            start, last = first + run.start(), first + run.end() - 1
            ranges.append(rf"\x{{{start:X}}}" if start == last else rf"\x{{{start:X}}}-\x{{{last:X}}}")
    return "".join(ranges)


@cache
def _all_characters() -> tuple[tuple[int, str], ...]:
    """(the first one's code point, characters), in order. Surrogates are left out: UTF-8 has none."""
    return tuple((first, "".join(map(chr, range(first, end)))) for first, end in ((0, 0xD800), (0xE000, 0x110000)))


def _hugging_face(tokenizer: HFTokenizer) -> Converted:
    """A tokenizer of `transformers`: its own `tokenizers` object, which knows its special tokens."""
    if tokenizer.tokenizer_mode:
        raise UnsupportedTokenizer(f"cannot convert a tokenizer with tokenizer_mode {tokenizer.tokenizer_mode!r}")
    inner = tokenizer.tokenizer
    if (backend := getattr(inner, "backend_tokenizer", None)) is None:
        raise UnsupportedTokenizer(f"cannot convert {type(inner).__name__}: it has no `tokenizers` object")
    for side in ("padding_side", "truncation_side"):
        if (value := getattr(inner, side)) != "right":
            raise UnsupportedTokenizer(f"cannot convert a tokenizer with {side} {value!r}; only 'right' is supported")
    zeroed = inner.sep_token_id if tokenizer.strip_sep_token else None
    return Converted(
        Tokenizer.from_str(backend.to_str()), inner.pad_token_id, _cleaning(tokenizer.clean_fn), zeroed=zeroed
    )
