"""What reads a bundle's texts: also for tokenizers that clean texts themselves, and for those that do not fit."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from vitrine.models.texts.reader import TextReader

WORDS = {word: number for number, word in enumerate(["<s>", "</s>", "[UNK]", "cat", "dog", "a"])}


def words(context=6):
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.enable_truncation(context)
    return tokenizer


def test_a_tokenizer_of_an_older_bundle_cleans_texts_itself():
    tokenizer = words()
    tokenizer.normalizer = normalizers.Lowercase()
    assert TextReader(tokenizer).read(["A Cat", "a &amp; cat"]) == [([0, 5, 3, 1], False), ([0, 5, 2, 3, 1], False)]


def test_what_is_cut_is_said_so_at_the_token_too_many():
    reader = TextReader(words(), "lower")
    assert reader.context == 6
    fits, cut = reader.read(["cat dog cat dog", "cat dog cat dog a"])
    assert fits == ([0, 3, 4, 3, 4, 1], False)
    assert cut == ([0, 3, 4, 3, 4, 1], True)


def test_special_tokens_written_in_a_text_count_where_they_are_pieces():
    reader = TextReader(words(), "lower", ["</s>"])
    assert reader.read(["a </s> cat", "a</s> cat", "a </s> cat dog a"]) == [
        ([0, 5, 1, 3, 1], False),
        ([0, 2, 3, 1], False),
        ([0, 5, 1, 3, 4, 1], True),
    ]


def test_a_token_may_be_read_as_zero():
    assert TextReader(words(), "lower", zeroed=1).read(["a cat"]) == [([0, 5, 3, 0], False)]


def test_written_tokens_that_are_none_are_refused():
    with pytest.raises(ValueError, match="'<mask>' is not a token"):
        TextReader(words(), "lower", ["<mask>"])
    plain = words()
    plain.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="between two special tokens"):
        TextReader(plain, "lower", ["</s>"])
