"""The converted tokenizers give open_clip's tokens for any text, or are refused by name."""

import random
from dataclasses import replace

import open_clip
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, bytes_to_unicode, get_clean_fn, get_reduction_mask_fn
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from unicode import TEXTS
from vitrine.models.clip.tokens import TokenizerMismatch, UnsupportedTokenizer, check_tokenizer, convert_tokenizer

CLEANING = ("lower", "whitespace", "canonicalize")


@pytest.fixture(scope="module")
def simple():
    """{cleaning: (open_clip's tokenizer, what reads texts in its place)}, of 16 tokens."""
    tokenizers = {how: SimpleTokenizer(context_length=16, clean=how) for how in CLEANING}
    return {how: (tokenizer, convert_tokenizer(tokenizer).reader()) for how, tokenizer in tokenizers.items()}


@pytest.mark.parametrize("how", CLEANING)
@settings(deadline=None, max_examples=300)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
@example(texts=["a<end_of_text>b!<end_of_text>'<start_of_text>'s<end_of_text><end_of_text> " + "x " * 20])
@example(texts=[" ".join("abcdefghijklmn"), " ".join("abcdefghijklmno"), "<end_of_text>" * 14, "<end_of_text>" * 15])
@example(texts=["x" * 5000, "", "\0", "\ud800", "&amp;" * 100])
def test_tokens_of_any_text_are_open_clips(simple, how, texts):
    tokenizer, reader = simple[how]
    for text, expected, (ids, is_cut) in zip(texts, tokenizer(texts).tolist(), reader.read(texts), strict=True):
        assert ids + [0] * (16 - len(ids)) == expected
        assert is_cut == (len(tokenizer.encode(text)) + 2 > 16)


def test_every_character_is_in_the_piece_that_open_clip_puts_it_in(simple):
    """Those that have a meaning in an order of chance, so that all kinds meet; the rest, private or unused, last."""
    tokenizer, reader = simple["whitespace"]
    characters = [chr(number) for number in range(0x34000) if not 0xD800 <= number < 0xE000]
    random.Random(0).shuffle(characters)
    text = "".join([*characters, *map(chr, range(0x34000, 0x110000))])
    expected = [piece.span() for piece in tokenizer.pat.finditer(text)]
    assert [place for _, place in reader._tokenizer.pre_tokenizer.pre_tokenize_str(text)] == expected
    assert len(expected) > 50_000


def test_byte_pairs_have_one_order(simple):
    """`tokenizers` and open_clip merge in the same order if no two merges make the same token."""
    tokenizer, _ = simple["lower"]
    assert len({"".join(pair) for pair in tokenizer.bpe_ranks}) == len(tokenizer.bpe_ranks)


def test_a_tokenizer_that_reads_otherwise_is_found_out(clip):
    converted = convert_tokenizer(clip.tokenizer)
    check_tokenizer(clip.tokenizer, converted, ["A Cat"])
    with pytest.raises(TokenizerMismatch, match=r"tokens of 'A Cat': open_clip .*, exported "):
        check_tokenizer(clip.tokenizer, replace(converted, clean="whitespace"), ["A Cat"])
    for change in ({"clean": "canonicalize"}, {"written": ()}, {"zeroed": 256 + ord("a") - ord("!")}):
        with pytest.raises(TokenizerMismatch):
            check_tokenizer(clip.tokenizer, replace(converted, **change), [])


class Fast:
    """What open_clip uses of a fast tokenizer of `transformers`, which is no dependency."""

    sep_token_id, pad_token_id, padding_side, truncation_side = 3, 0, "right", "right"

    def __init__(self, backend_tokenizer):
        self.backend_tokenizer = backend_tokenizer

    def __call__(self, texts, max_length, **_):
        import torch

        tokenizer = Tokenizer.from_str(self.backend_tokenizer.to_str())
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(length=max_length, pad_id=self.pad_token_id)
        self.input_ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
        return self


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def hugging_face(backend, clean="whitespace", strip_sep_token=False, tokenizer_mode="", **attributes):
    """open_clip's tokenizer around one of `transformers`, made without a download."""
    tokenizer = HFTokenizer.__new__(HFTokenizer)
    tokenizer.tokenizer_mode, tokenizer.context_length = tokenizer_mode, 12
    tokenizer.clean_fn, tokenizer.strip_sep_token = get_clean_fn(clean), strip_sep_token
    tokenizer.tokenizer = Fast(backend)
    for name, value in attributes.items():
        setattr(tokenizer.tokenizer, name, value)
    return tokenizer


def finished(backend):
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return backend


def word_piece():
    words = [*SPECIAL, "a", "cat", "dog", "ben", "jerry", "##s", "##t", "&", ";", "amp", "'", "s", "ca", "##fe"]
    backend = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return finished(backend)


def byte_level():
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *bytes_to_unicode().values(), "ca"])}
    backend = Tokenizer(models.BPE(vocabulary, [("c", "a")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return finished(backend)


def sentence_piece():
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁cat", "s", "▁a", "é"]
    backend = Tokenizer(models.Unigram([(piece, -float(len(piece))) for piece in pieces], 1, byte_fallback=True))
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return finished(backend)


BACKENDS = {"WordPiece": word_piece, "byte level": byte_level, "SentencePiece": sentence_piece}
OPTIONS = {"plain": {}, "without [SEP]": {"strip_sep_token": True}, "canonicalize": {"clean": "canonicalize"}}


@pytest.fixture(scope="module", params=[(backend, options) for backend in BACKENDS for options in OPTIONS], ids=str)
def hugging_face_pair(request):
    backend, options = request.param
    tokenizer = hugging_face(BACKENDS[backend](), **OPTIONS[options])
    return tokenizer, convert_tokenizer(tokenizer).reader()


@settings(deadline=None, max_examples=50)
@given(text=TEXTS)
@example(text="a cat [SEP] cats")
@example(text="Ben &amp; Jerry")
@example(text="cat " * 20)
def test_tokens_of_hugging_faces_tokenizers_are_open_clips(hugging_face_pair, text):
    tokenizer, reader = hugging_face_pair
    ((ids, is_cut),) = reader.read([text])
    assert ids + [0] * (12 - len(ids)) == tokenizer([text])[0].tolist()
    whole = tokenizer.tokenizer.backend_tokenizer.encode(tokenizer.clean_fn(text)).ids
    assert is_cut == (len(whole) > 12)


def test_a_separator_is_zero_where_open_clip_makes_it_so():
    reader = convert_tokenizer(hugging_face(word_piece(), strip_sep_token=True)).reader()
    assert reader.read(["a [SEP] cat"])[0].ids == [2, 4, 0, 5, 0]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SimpleTokenizer(reduction_mask="simple"), "reduction_mask"),
        (lambda: SimpleTokenizer(additional_special_tokens=["<mask>"]), "additional_special_tokens: <mask>"),
        (lambda: hugging_face(word_piece(), tokenizer_mode="clips"), "tokenizer_mode 'clips'"),
        (lambda: hugging_face(word_piece(), padding_side="left"), "padding_side 'left'"),
        (lambda: hugging_face(word_piece(), truncation_side="left"), "truncation_side 'left'"),
        (lambda: hugging_face(None), "cannot convert Fast: it has no `tokenizers` object"),
        (object, "cannot convert a tokenizer of type object"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_by_name(make, named):
    with pytest.raises(UnsupportedTokenizer, match=named):
        convert_tokenizer(make())


@pytest.mark.parametrize(
    ("attribute", "value", "named"),
    [("clean_fn", str.title, "cleans texts by"), ("pat", open_clip.tokenizer.re.compile(r"\w+"), "splits texts by")],
)
def test_changes_of_open_clip_are_noticed(attribute, value, named):
    tokenizer = SimpleTokenizer()
    setattr(tokenizer, attribute, value)
    with pytest.raises(UnsupportedTokenizer, match=named):
        convert_tokenizer(tokenizer)


def test_every_reduction_mask_is_refused():
    tokenizer = SimpleTokenizer()
    for mask in ("simple", "random", "shuffle", "syntax"):
        tokenizer.reduction_fn = get_reduction_mask_fn(mask)
        with pytest.raises(UnsupportedTokenizer, match="reduction_mask"):
            convert_tokenizer(tokenizer)
