"""open_clip's tokenizers as Hugging Face `tokenizers`, so that the service needs neither torch nor open_clip."""

from __future__ import annotations

from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vitrine.models.errors import VitrineError

# open_clip cleans texts with ftfy and HTML unescaping before it splits them. Of ftfy only what matters for labels is
# reproduced: straight quotes and composed accents. Ligatures, mojibake and HTML entities are left unchanged.
CHECKED_TEXTS = (
    "a photo of a cat",
    "Two  DOGS, one frisbee!",
    "it's the neighbour's car; they'll've gone",
    "naïve façade, Ænima, Straße",
    "猫 и собака",
    "emoji 🐈 123 4.5%",
    "“don’t” walk",
    "cafe\u0301",
    "a-b_c/d (e) [f] {g}",
    "word " * 200,
    "",
)


class TokenizerMismatch(VitrineError):
    """The converted tokenizer and open_clip's give different tokens for a text; the message shows both."""


def convert_tokenizer(tokenizer: Any) -> tuple[Tokenizer, int]:
    """(the same tokenizer for the `tokenizers` library, with truncation and padding; id of the padding token).

    Raises `TypeError` for a type of tokenizer that open_clip's CLIP models do not use.
    """
    if isinstance(tokenizer, SimpleTokenizer):
        converted, pad = _byte_pair(tokenizer), 0
    elif isinstance(tokenizer, HFTokenizer):
        converted = Tokenizer.from_str(tokenizer.tokenizer.backend_tokenizer.to_str())
        pad = tokenizer.tokenizer.pad_token_id
    else:
        raise TypeError(f"cannot convert a tokenizer of type {type(tokenizer).__name__}")
    converted.enable_truncation(tokenizer.context_length)
    converted.enable_padding(length=tokenizer.context_length, pad_id=pad)
    return converted, pad


def check_tokenizer(tokenizer: Any, converted: Tokenizer, texts: list[str]) -> None:
    """Raise `TokenizerMismatch` unless both give the same tokens for `texts` and `CHECKED_TEXTS`."""
    for text in [*texts, *CHECKED_TEXTS]:
        expected = tokenizer([text])[0].tolist()
        actual = converted.encode(text).ids
        if actual != expected:
            raise TokenizerMismatch(f"tokens of {text!r}: open_clip {expected}, exported {actual}")


def _byte_pair(tokenizer: SimpleTokenizer) -> Tokenizer:
    """CLIP's lower-case byte-pair encoding with `</w>` at the end of words."""
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    special = [tokenizer.decoder[start], tokenizer.decoder[end]]
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    converted = Tokenizer(models.BPE(vocab=tokenizer.encoder, merges=merges, end_of_word_suffix="</w>"))
    converted.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex("[\u02bc\u2018-\u201b]"), "'"),
            normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    converted.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}", special_tokens=list(zip(special, (start, end), strict=True))
    )
    converted.decoder = decoders.ByteLevel()
    return converted
