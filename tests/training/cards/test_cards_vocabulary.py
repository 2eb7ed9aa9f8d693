"""Vocabularies by name and from files."""

import pytest
import torch
from rich.console import Console

from vitrine.models.progress import Progress
from vitrine.training.cards.vocabulary import NAMED, VocabularyError, embed, read_vocabulary


def test_every_word_once_in_order(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("# of mine\nred\n\n  two words  # the second\nnaïve\n", encoding="utf-8")
    assert read_vocabulary([str(file), "labels"], ["cat", "red"]) == ["red", "two words", "naïve", "cat"]
    words = read_vocabulary(NAMED, ["tench", "Bauhaus"])
    assert len(words) == len(set(words)) > 1000
    assert words[:3] == ["tench", "Bauhaus", "goldfish"]


@pytest.mark.parametrize("sources", [["nowhere.txt"], ["labels"]])
def test_an_invalid_vocabulary_is_refused(sources):
    with pytest.raises(VocabularyError, match=sources[0]):
        read_vocabulary(sources, ["only one"])


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(VocabularyError, match=r"x\.txt"):
        read_vocabulary([str(tmp_path / "x.txt")], ["a", "b"])


def test_embeddings_are_about_their_mean(clip):
    words, templates = ["red circle", "green square", "blue triangle"], ["a photo of a {}", "{}"]
    embeddings = embed(clip, words, templates, Progress(Console(quiet=True)))
    raw = clip.encode_labels(words, templates)
    expected = torch.nn.functional.normalize(raw - raw.mean(0), dim=-1)
    assert torch.allclose(embeddings, expected, atol=1e-5)
