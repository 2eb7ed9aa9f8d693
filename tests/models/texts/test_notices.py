"""What is said of labels: the same for any tokenizer, in sentences of bounded length."""

import open_clip
import pytest

from vitrine.models.clip.tokens import convert_tokenizer
from vitrine.models.texts.labels import GROUPS, LISTED, notices_of


@pytest.fixture(scope="module")
def reader():
    return convert_tokenizer(open_clip.SimpleTokenizer(context_length=16)).reader()


def said(reader, labels, templates=("a photo of a {}",)):
    return [(notice.code, notice.labels) for notice in notices_of(reader, labels, templates)]


def test_of_most_labels_nothing_is_said(reader):
    assert said(reader, ["cat", "dog", "naïve café", "собака", "日本", "it's!", "?", "7"]) == []


def test_labels_are_cut_where_a_template_with_them_is_too_long(reader):
    label = "one two three four five six seven eight nine"  # nine tokens, besides two for start and end
    assert said(reader, [label, "cat"], ["{}", "a {} and a dog"]) == []
    assert said(reader, [label, "cat"], ["{}", "a photo of a {} and a dog"]) == [("labels_cut", (label,))]


def test_labels_are_the_same_where_all_their_texts_are(reader):
    assert said(reader, ["Cat", "dog", "cat", "ｃａｔ"]) == [("labels_same", ("Cat", "cat", "ｃａｔ"))]
    long = "very " * 14
    assert said(reader, [f"{long}cat", f"{long}dog"])[1] == ("labels_same", (f"{long}cat", f"{long}dog"))
    shorter = "very " * 13  # cut to the same text by one template, not by the other
    labels = (f"{shorter}cat", f"{shorter}dog")
    assert said(reader, labels, ["a {}"])[1:] == [("labels_same", labels)]
    assert said(reader, labels, ["a {}", "{}"]) == [("labels_cut", labels)]
    assert said(reader, ["cat", "cat"]) == []  # one label, sent twice


@pytest.mark.parametrize("label", ["猫", "λ", "<end_of_text>", "&zwnj;", "\u200b", "ñ"])
def test_labels_without_a_whole_character_are_unknown(reader, label):
    for templates in (["{}"], ["a photo of a {}"], ["a {}", "{}"]):
        assert said(reader, ["cat", label, f"{label} cat"], templates)[-1] == ("labels_unknown", (label,))


def test_labels_of_which_cleaning_leaves_nothing_are_unknown():
    reader = convert_tokenizer(open_clip.SimpleTokenizer(context_length=16, clean="canonicalize")).reader()
    assert said(reader, ["?!", "cat"]) == [("labels_unknown", ("?!",))]


def test_sentences_name_a_few_labels_on_one_line(reader):
    words = [f"{name.lower()} " * 20 for name in open_clip.IMAGENET_CLASSNAMES[:200]]
    labels = ["xyz" * 100, "b\n\x1b[31mb" + "cd " * 100, *words]
    cut, *_ = notices_of(reader, labels, ["{}"])
    named = (
        f'"{labels[0][:28]}…{labels[0][-12:]}", "b��[31mb{"cd " * 6}cd…{"cd " * 4}", "{words[0][:28]}…{words[0][-12:]}"'
    )
    says = "are cut: this CLIP reads only 16 tokens of a text. Shorten the label or its template."
    assert cut.message == f"{named} and 199 more {says}"
    assert cut.labels == tuple(labels[:LISTED])


def test_many_groups_are_counted(reader):
    words = open_clip.IMAGENET_CLASSNAMES[: GROUPS + 3]
    labels = [label for word in words for label in (word.lower(), word.upper())]
    notices = notices_of(reader, labels, ["{}"])
    assert len(notices) == GROUPS + 1
    assert notices[0].message == (
        '"tench" and "TENCH" are the same text to this CLIP, so their order means nothing. Keep one of them.'
    )
    assert notices[-1].message.endswith(" and 3 more are in 3 more groups of labels that are the same text.")
    assert notices[-1].labels == tuple(labels[-6:])
    assert max(len(notice.message) for notice in notices) < 300
