"""Label texts to embeddings: the same as the CLIP's own, each encoded once."""

import asyncio
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings

from broken import copy, tokenizer, write_manifest
from unicode import TEXTS
from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.bundle.label_sets import NamedLabels
from vitrine.models.bundle.sealing import seal
from vitrine.models.graph.onnx_file import save_onnx
from vitrine.models.graph.text import TextGraph, text_to_onnx
from vitrine.models.texts.labels import label_readings, label_texts
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import PROMPTS_AT_ONCE, LabelEncoder, bundle_notices
from vitrine.service.operations.settings import Settings

TEMPLATES = ("a photo of a {}", "{}", "two {}, or one {}.")
LABELS = ("cat", "Fire  Truck", "naïve café", "猫", "it's", "a" * 256, "<|endoftext|>", "Ben &amp; Jerry", "schÃ¶n")


@pytest.fixture(scope="module")
def label_encoder(engine):
    """For what keeps nothing."""
    return LabelEncoder(engine, 1)


@pytest.fixture
def encoder(engine):
    return LabelEncoder(engine, 1000)


@pytest.fixture
def encoded(encoder, monkeypatch):
    """How often each label was encoded."""
    counts, read = Counter(), encoder._read

    async def counting(labels, templates):
        counts.update(labels)
        return await read(labels, templates)

    monkeypatch.setattr(encoder, "_read", counting)
    return counts


async def run(function, *arguments, spent):
    """Run in another thread, after other tasks had their turn."""
    await asyncio.sleep(0)
    return await asyncio.to_thread(function, *arguments)


def resolve(encoder, labels, templates=TEMPLATES):
    return asyncio.run(encoder.resolve(tuple(labels), tuple(templates), run))


@pytest.mark.parametrize("templates", [("{}",), TEMPLATES])
@pytest.mark.parametrize("labels", [LABELS[:1], LABELS])
def test_embeddings_equal_the_clips_own(clip, encoder, labels, templates):
    label_set = resolve(encoder, labels, templates)
    assert label_set.labels == labels
    assert label_set.embeddings.dtype == np.float32
    expected = clip.encode_labels(list(labels), list(templates)).numpy()
    np.testing.assert_allclose(label_set.embeddings, expected, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=100)
@given(label=TEXTS)
@example(label="<end_of_text> cat")
def test_tokens_of_any_label_are_the_clips_own(clip, label_encoder, label):
    texts, _ = asyncio.run(label_encoder._read([label], TEMPLATES))
    expected = clip.tokenizer([template.replace("{}", label) for template in TEMPLATES]).tolist()
    assert [ids + [0] * (16 - len(ids)) for ids in texts] == expected


def test_a_bundle_of_an_older_version_is_read_as_before(bundle, label_encoder, tmp_path):
    """Its tokenizer.json cleans texts, and its manifest says nothing of that."""
    older = copy(bundle.path, tmp_path / "older")
    tokenizer(lambda settings: settings.update(normalizer={"type": "Lowercase"}))(older)
    write_manifest(older, lambda manifest: [manifest["text"].pop(name) for name in ("clean", "written", "zeroed")])
    encoder = LabelEncoder(Engine(open_bundle(older), Settings()), 100)
    assert encoder.reader.read(["A Cat &amp; I"]) == encoder.reader.read(["a cat &amp; i"])
    assert encoder.reader.read(["A Cat"]) == label_encoder.reader.read(["a cat"])
    assert encoder.reader.read(["&amp;"]) != label_encoder.reader.read(["&amp;"])


def test_embeddings_are_unit(encoder):
    np.testing.assert_allclose(np.linalg.norm(resolve(encoder, LABELS).embeddings, axis=1), 1, atol=1e-6)


def test_the_bundles_default_labels_and_templates_are_known(encoder, bundle):
    assert encoder.default_labels == bundle.manifest.text.labels
    assert encoder.default_templates == bundle.manifest.text.templates


PETS = NamedLabels(labels=("cat", "dog"))
TREES = NamedLabels(labels=("oak", "elm"), templates=("a {} tree",))


def test_named_sets_are_encoded_once_and_never_forgotten(engine, bundle, monkeypatch):
    encoder = LabelEncoder(engine, 1)  # a cache that holds almost nothing
    asyncio.run(encoder.add({"pets": PETS, "trees": TREES}, run))
    calls, read = [], encoder._read
    monkeypatch.setattr(encoder, "_read", lambda *texts: calls.append(texts) or read(*texts))
    assert list(encoder.named) == ["default", "pets", "trees"]
    assert encoder.named["pets"].templates == bundle.manifest.text.templates
    for name, definition in (("pets", PETS), ("trees", TREES)):
        named = encoder.named[name]
        cached = resolve(encoder, named.labels, named.templates)
        fresh = LabelEncoder(engine, 10).encode(definition.labels, named.templates)
        np.testing.assert_allclose(cached.embeddings, fresh, rtol=0, atol=1e-6)
    assert calls == []
    resolve(encoder, PETS.labels, TREES.templates)  # other templates: another set
    assert len(calls) > 0


def test_the_bundles_sets_are_known_without_encoding(engine, monkeypatch):
    embeddings = np.eye(2, 24, dtype=np.float32)
    monkeypatch.setitem(vars(engine.bundle), "label_sets", {"pets": (PETS, embeddings)})
    encoder = LabelEncoder(engine, 10)
    monkeypatch.setattr(engine, "encode_texts", None)
    label_set = resolve(encoder, PETS.labels, encoder.default_templates)
    assert (label_set.labels, encoder.named["pets"].labels) == (PETS.labels, PETS.labels)
    np.testing.assert_array_equal(label_set.embeddings, embeddings)


CODES = {
    ("cat", "dog"): [],
    ("Cat", "dog", "cat", "dog &amp; I", "DOG & i"): ["labels_same", "labels_same"],
    ("cat", "a" * 256): ["labels_cut"],
    ("cat", "猫"): ["labels_unknown"],
}


@pytest.mark.parametrize("labels", CODES, ids=lambda labels: "/".join(labels)[:20])
def test_what_there_is_to_say_of_labels_comes_with_them(engine, encoder, encoded, labels):
    codes = CODES[labels]
    for _ in range(2):  # new, and from the cache
        assert [notice.code for notice in resolve(encoder, labels).notices] == codes
    assert encoded == dict.fromkeys(labels, 1)
    assert [
        notice.code for notice in resolve(encoder, labels[::-1]).notices
    ] == codes  # another set, of the same labels
    assert encoded == dict.fromkeys(labels, 1)
    small = LabelEncoder(engine, 1)  # which keeps none
    assert [notice.code for notice in resolve(small, labels).notices] == codes


@pytest.mark.parametrize(("label", "texts"), [("cat", 24), ("cat &amp; dog", 24), ("x" * 700, 23), ("&amp;" * 200, 1)])
def test_texts_are_read_in_pieces_of_which_none_takes_long(encoder, monkeypatch, label, texts):
    pieces, read = [], encoder.reader.read
    monkeypatch.setattr(encoder.reader, "read", lambda piece: pieces.append(list(piece)) or read(piece))
    templates = [f"{{}} {number}" for number in range(24)]
    found = asyncio.run(encoder._read([label], templates))
    assert max(map(len, pieces)) == texts + (texts == 24)  # and the label alone
    assert [text for piece in pieces for text in piece] == [
        *(template.replace("{}", label) for template in templates),
        label,
    ]
    monkeypatch.undo()
    assert found == label_readings(encoder.reader, encoder.reader.read(label_texts([label], templates)), templates)


def test_nothing_is_encoded_to_say_it(engine, encoder, monkeypatch):
    resolve(encoder, ["cat", "a" * 256])
    monkeypatch.setattr(engine, "encode_texts", None)
    notices = asyncio.run(encoder.notices(("cat", "Cat", "a" * 256, "dog"), TEMPLATES))
    assert [(notice.code, notice.labels) for notice in notices] == [
        ("labels_cut", ("a" * 256,)),
        ("labels_same", ("cat", "Cat")),
    ]


def test_texts_of_a_bundles_set_are_read_when_it_is_first_asked_for(engine, monkeypatch):
    named = NamedLabels(labels=("cat", "Cat"))
    monkeypatch.setitem(vars(engine.bundle), "label_sets", {"pets": (named, np.eye(2, 24, dtype=np.float32))})
    encoder = LabelEncoder(engine, 10)
    calls, read = [], encoder._read
    monkeypatch.setattr(encoder, "_read", lambda *texts: calls.append(texts) or read(*texts))
    for _ in range(2):
        ((code, _, labels),) = resolve(encoder, named.labels, encoder.default_templates).notices
        assert (code, labels, len(calls)) == ("labels_same", named.labels, 1)
    assert asyncio.run(encoder.notices(named.labels, encoder.default_templates))[0].labels == named.labels
    assert len(calls) == 1
    assert bundle_notices(engine.bundle, named.labels, encoder.default_templates)[0].labels == named.labels


@pytest.fixture
def groups(engine, monkeypatch):
    """Shapes of the groups that are encoded, none of them of more than 100 tokens unless it is one text."""
    shapes, encode_text = [], engine.encode_text
    monkeypatch.setattr(engine, "encode_text", lambda tokens: shapes.append(tokens.shape) or encode_text(tokens))
    monkeypatch.setattr(engine.text_groups, "tokens", 100)
    monkeypatch.setattr(engine.text_groups, "record", lambda tokens, seconds: None)
    return shapes


@pytest.mark.parametrize("templates", [1, 3, PROMPTS_AT_ONCE, 2 * PROMPTS_AT_ONCE])
def test_large_sets_are_encoded_in_small_groups(encoder, engine, groups, templates):
    labels = [f"label {i}" for i in range(7)]
    label_set = resolve(encoder, labels, [f"{{}} {i}" for i in range(templates)])
    assert label_set.embeddings.shape == (7, 24)
    assert sum(texts for texts, _ in groups) == 7 * templates
    assert max(texts * length for texts, length in groups) <= 100
    alone = resolve(LabelEncoder(engine, 10), labels[6:], [f"{{}} {i}" for i in range(templates)])
    np.testing.assert_allclose(label_set.embeddings[6:], alone.embeddings, atol=1e-6)


def test_texts_are_as_long_as_they_are(encoder, groups):
    """The context is 16; a short label has three tokens, or four."""
    resolve(encoder, ["cat", "a" * 256, "dog", "two dogs"], ["{}"])
    assert groups == [(3, 4), (1, 16)]


def test_a_bundle_whose_text_graph_has_one_length_is_served_as_before(bundle, clip, tmp_path):
    graph = TextGraph(clip.model).eval()
    graph.any_length = False
    older = tmp_path / "older"
    shutil.copytree(bundle.path, older)
    save_onnx(text_to_onnx(graph, clip.context), older / "text.onnx")
    encoder = LabelEncoder(Engine(seal(older, bundle.manifest), Settings()), 100)
    assert encoder.engine.text.get_inputs()[0].shape[1] == 16
    encoder.engine.warm_up()
    expected = clip.encode_labels(list(LABELS), list(TEMPLATES)).numpy()
    np.testing.assert_allclose(resolve(encoder, LABELS).embeddings, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(LABELS, TEMPLATES), expected, rtol=0, atol=1e-5)


def test_a_request_has_one_group_in_hand_and_says_what_it_has_spent(encoder, groups):
    in_hand, most, spending = 0, 0, []

    async def watched(function, texts, spent):
        nonlocal in_hand, most
        in_hand += 1
        most = max(most, in_hand)
        spending.append((spent, len(texts) * max(map(len, texts))))
        result = await run(function, texts, spent=spent)
        in_hand -= 1
        return result

    async def ask():
        labels = tuple(f"label {i}" for i in range(100))
        return await asyncio.gather(*(encoder.resolve(labels, TEMPLATES, watched) for _ in range(8)))

    first, *others = asyncio.run(ask())  # as the images of one batch do
    assert all(label_set.embeddings is first.embeddings for label_set in others)
    assert most == 1
    assert [spent for spent, _ in spending] == np.cumsum([0, *(cost for _, cost in spending)])[:-1].tolist()


def test_a_set_asked_for_again_is_not_encoded_again(encoder, encoded):
    first = resolve(encoder, LABELS)
    second = resolve(encoder, LABELS)
    assert encoded == dict.fromkeys(LABELS, 1)
    assert np.array_equal(first.embeddings, second.embeddings)


def test_labels_are_shared_between_sets(encoder, encoded):
    first = resolve(encoder, ["cat", "dog"])
    second = resolve(encoder, ["car", "dog", "cat"])
    assert encoded == {"cat": 1, "dog": 1, "car": 1}
    assert second.labels == ("car", "dog", "cat")
    assert np.array_equal(second.embeddings[[2, 1]], first.embeddings)


def test_other_templates_are_other_embeddings(encoder, encoded):
    first, second = resolve(encoder, ["cat"], ["{}"]), resolve(encoder, ["cat"], ["no {}"])
    assert encoded == {"cat": 2}
    assert not np.allclose(first.embeddings, second.embeddings)
    assert np.array_equal(resolve(encoder, ["cat"], ["{}"]).embeddings, first.embeddings)


def test_order_is_kept(encoder):
    labels = tuple(sorted(LABELS))
    forwards, backwards = resolve(encoder, labels), resolve(encoder, labels[::-1])
    assert backwards.labels == labels[::-1]
    assert np.array_equal(forwards.embeddings, backwards.embeddings[::-1])


def test_new_labels_asked_for_at_once_are_encoded_once(encoder, encoded):
    async def ask():
        sets = [("cat", "dog"), ("cat", "dog"), ("dog", "cat", "car"), ("car",)]
        return await asyncio.gather(*(encoder.resolve(labels, TEMPLATES, run) for labels in sets))

    pair, same, three, one = asyncio.run(ask())
    assert encoded == {"cat": 1, "dog": 1, "car": 1}
    assert np.array_equal(pair.embeddings, same.embeddings)
    assert np.array_equal(three.embeddings[[1, 0]], pair.embeddings)
    assert np.array_equal(three.embeddings[2:], one.embeddings)


def test_many_new_labels_do_not_hold_up_a_few(encoder):
    """2,048 labels under 128 templates are 262,144 texts; a request for two new labels meanwhile is answered first."""

    async def scene():
        many = asyncio.create_task(encoder.resolve(tuple(f"label {i}" for i in range(2000)), TEMPLATES, run))
        await asyncio.sleep(0.01)
        await encoder.resolve(("cat", "dog"), TEMPLATES, run)
        first = not many.done()
        await many
        return first

    assert asyncio.run(scene())


def test_after_a_failure_the_encoder_works(encoder):
    async def fail(*_, spent):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        asyncio.run(encoder.resolve(LABELS, TEMPLATES, fail))
    assert resolve(encoder, LABELS).embeddings.shape == (len(LABELS), 24)


@pytest.mark.parametrize("others", [LABELS, LABELS[::-1], LABELS[:2]], ids=["the same", "reversed", "fewer"])
def test_who_waits_for_a_request_that_is_cancelled_takes_over(encoder, encoded, others):
    async def scene():
        begun = asyncio.Event()

        async def slow(function, *arguments, spent):
            begun.set()
            await asyncio.sleep(60)

        first = asyncio.create_task(encoder.resolve(LABELS, TEMPLATES, slow))
        second = asyncio.create_task(encoder.resolve(others, TEMPLATES, run))
        await begun.wait()
        await asyncio.sleep(0)
        assert not second.done()
        first.cancel()
        async with asyncio.timeout(30):
            return await second

    assert asyncio.run(scene()).embeddings.shape == (len(others), 24)
    assert encoded == {label: 1 + (label in others) for label in LABELS}


@pytest.mark.parametrize("capacity", [1, 3, len(LABELS) - 1])
def test_a_cache_smaller_than_the_set_answers_right(engine, capacity):
    expected = resolve(LabelEncoder(engine, 1000), LABELS).embeddings
    small = LabelEncoder(engine, capacity)
    for _ in range(2):
        np.testing.assert_allclose(resolve(small, LABELS).embeddings, expected, atol=1e-6)
        np.testing.assert_allclose(resolve(small, LABELS[2:4]).embeddings, expected[2:4], atol=1e-6)


def test_the_cache_keeps_no_more_than_it_may(engine):
    encoder = LabelEncoder(engine, 10)
    for start in range(0, 100, 5):
        resolve(encoder, [f"label {i}" for i in range(start, start + 5)])
    assert len(encoder._labels) <= 10
    assert sum(len(label_set.labels) for label_set in encoder._sets.values()) <= 10


def test_a_kept_embedding_keeps_no_others_in_memory(engine):
    """The embeddings of one call are one array; a view of one of them would keep all in memory."""
    encoder = LabelEncoder(engine, 1)
    resolve(encoder, [f"label {i}" for i in range(20)])
    ((kept, _),) = encoder._labels.values()
    assert kept.base is None or kept.base.nbytes == kept.nbytes
