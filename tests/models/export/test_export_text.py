"""The text graph: the same embedding at every length, where the tower allows it; and a check that notices if not."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from tokenizers import Tokenizer

from common import TINY_CLIP
from vitrine.models.clip.tokens import convert_tokenizer
from vitrine.models.export.parity import check_text
from vitrine.models.graph.onnx_file import ExportError, save_onnx
from vitrine.models.graph.text import TextGraph, text_to_onnx
from vitrine.models.texts.reader import TextReader

TEXTS = ["a photo of a red circle", "two dogs", "", "it's Naïve!", "a much longer label than sixteen tokens " * 3]
CONTEXT = TINY_CLIP["text_cfg"]["context_length"]
END = 49407


def texts_of_every_length(pad=0):
    """Tokens [15, 16] of texts of 2 to 16 tokens."""
    tokens = torch.randint(1, 49000, (CONTEXT - 1, CONTEXT), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(range(2, CONTEXT + 1)):
        tokens[row, length - 1], tokens[row, length:] = END, pad
    return tokens


@pytest.fixture(scope="module")
def session(bundle):
    return onnxruntime.InferenceSession(bundle.path / "text.onnx", providers=["CPUExecutionProvider"])


def embed(session, tokens):
    return session.run(["text_embedding"], {"tokens": np.asarray(tokens)})[0]


def test_every_length_gives_open_clips_embedding_at_the_full_one(session, clip):
    tokens = texts_of_every_length()
    expected = clip.model.encode_text(tokens, normalize=True).numpy()
    for row, length in enumerate(range(2, CONTEXT + 1)):
        np.testing.assert_allclose(embed(session, tokens[row : row + 1, :length]), expected[row : row + 1], atol=1e-6)
        np.testing.assert_allclose(embed(session, tokens[: row + 1, :length]), expected[: row + 1], atol=1e-6)


def test_texts_at_their_own_length_are_embedded_as_clip_does(session, bundle, clip):
    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    tokenizer.no_padding()
    lengths = []
    for text, (ids, _) in zip(TEXTS, TextReader(tokenizer, bundle.manifest.text.clean).read(TEXTS), strict=True):
        lengths.append(len(ids))
        np.testing.assert_allclose(embed(session, [ids])[0], clip.encode_labels([text], ["{}"])[0], atol=1e-5)
    assert (min(lengths), max(lengths)) == (2, CONTEXT)


def make_model(kind=open_clip.CLIP, quick_gelu=False, **text):
    """A tiny CLIP with random weights, its text tower changed by `text`."""
    torch.manual_seed(0)
    extra = {"multimodal_cfg": {"layers": 1, "width": 16, "heads": 2}} if kind is open_clip.CoCa else {}
    config = TINY_CLIP | {"text_cfg": TINY_CLIP["text_cfg"] | text}
    model = kind(**config, **extra, quick_gelu=quick_gelu).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


ANY_LENGTH = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "a tower of its own": {"kind": open_clip.CustomTextCLIP},
    "read at the first end token": {"kind": open_clip.CustomTextCLIP, "pool_type": "eos", "eos_id": END},
    "the same, padded with it": {"pool_type": "eos", "eos_id": END},
    "projected with a bias": {"kind": open_clip.CustomTextCLIP, "proj_bias": True},
    "not projected": {"kind": open_clip.CustomTextCLIP, "proj_type": "none"},
}
ONE_LENGTH = {
    "it attends to the padding": {"no_causal_mask": True},
    "it attends to the padding, in a tower of its own": {"kind": open_clip.CustomTextCLIP, "no_causal_mask": True},
    "it reads the last token": {"kind": open_clip.CustomTextCLIP, "pool_type": "last"},
    "it reads a class token": {"kind": open_clip.CoCa, "embed_cls": True, "output_tokens": True},
}


@pytest.mark.parametrize("options", ANY_LENGTH.values(), ids=ANY_LENGTH)
def test_a_causal_tower_that_reads_the_end_token_takes_any_length(options):
    model = make_model(**options)
    graph, tokens = TextGraph(model), texts_of_every_length(pad=END if options.get("pool_type") == "eos" else 0)
    assert graph.any_length
    expected = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(graph(tokens), expected)
    for row, length in enumerate(range(2, CONTEXT + 1)):
        torch.testing.assert_close(graph(tokens[: row + 1, :length]), expected[: row + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", ONE_LENGTH.values(), ids=ONE_LENGTH)
def test_another_tower_keeps_the_context(options):
    model = make_model(**options)
    graph, tokens = TextGraph(model), texts_of_every_length()
    assert not graph.any_length
    torch.testing.assert_close(graph(tokens), model.encode_text(tokens, normalize=True))


def exported(model, path, any_length):
    graph = TextGraph(model).eval()
    graph.any_length = any_length
    save_onnx(text_to_onnx(graph, CONTEXT), path)
    return graph


def test_a_tower_of_one_length_is_exported_and_checked_at_that(clip, tmp_path):
    model, path = make_model(no_causal_mask=True), tmp_path / "text.onnx"
    graph = exported(model, path, any_length=False)
    check_text(replace(clip, model=model), graph, convert_tokenizer(clip.tokenizer), TEXTS, path)
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", CONTEXT]
    expected = model.encode_text(texts_of_every_length(), normalize=True)
    np.testing.assert_allclose(embed(session, texts_of_every_length()), expected, atol=1e-5)


def test_the_check_notices_a_tower_whose_embedding_depends_on_the_padding(clip, tmp_path):
    model, path = make_model(), tmp_path / "text.onnx"
    model.attn_mask.zero_()  # attends to everything, and is exported as if it did not
    other, tokenizer = replace(clip, model=model), convert_tokenizer(clip.tokenizer)
    graph = exported(model, path, any_length=True)
    with pytest.raises(ExportError, match=r"^text embedding of 'a photo of a red circle' at its own length: relative"):
        check_text(other, graph, tokenizer, TEXTS, path)
    with pytest.raises(ExportError, match=r"^text embeddings of up to \d+ tokens: relative"):
        check_text(other, graph, tokenizer, TEXTS[-1:], path)  # the only text given has the full length


def test_the_check_notices_another_text_tower(clip, bundle):
    graph, tokenizer, path = TextGraph(clip.model), convert_tokenizer(clip.tokenizer), bundle.path / "text.onnx"
    check_text(clip, graph, tokenizer, TEXTS, path)
    model = deepcopy(clip.model)
    model.text_projection[0] += 0.1
    with pytest.raises(ExportError, match=r"^text embedding: relative difference"):
        check_text(replace(clip, model=model), graph, tokenizer, TEXTS, path)
