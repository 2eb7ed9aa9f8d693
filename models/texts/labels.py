"""What a CLIP makes of labels where one would not expect it: cut, the same as another, without meaning to it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from vitrine.models.texts.reader import TextReader, Tokens

NAMED, START, END = 3, 28, 12  # labels that a message names, and how many characters of each
LISTED = 100  # labels of one notice
GROUPS = 20  # of labels that are the same, each with a notice of its own


class LabelReading(NamedTuple):
    """What a CLIP reads of a label under templates."""

    tokens: bytes  # digest; labels with equal ones are one and the same text to the CLIP
    is_cut: bool  # under at least one template
    is_unknown: bool  # the label alone has no token that means anything (`TextReader.means_nothing`)


class LabelNotice(NamedTuple):
    """Something to know of labels."""

    code: str  # labels_cut, labels_same, labels_unknown
    message: str  # a sentence or two, of bounded length
    labels: tuple[str, ...]  # the first `LISTED` that it is about


def label_texts(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every label in every template, label by label; then the labels alone, if no template has them so."""
    texts = [template.replace("{}", label) for label in labels for template in templates]
    return texts if "{}" in templates else [*texts, *labels]


def label_readings(
    reader: TextReader, texts: Sequence[Tokens], templates: Sequence[str]
) -> tuple[list[list[int]], list[LabelReading]]:
    """(tokens of every label in every template; what is read of each label). texts: as of `label_texts`."""
    count = len(templates)
    if "{}" in templates:
        alone, filled = texts[templates.index("{}") :: count], texts
    else:
        labels = len(texts) // (count + 1)
        alone, filled = texts[-labels:], texts[:-labels]
    readings = []
    for index, label in enumerate(alone):
        own = filled[index * count : (index + 1) * count]
        digest = hashlib.sha256()
        for ids, _ in own:
            digest.update(array("q", (len(ids), *ids)).tobytes())
        is_cut = any(text.is_cut for text in own)
        readings.append(LabelReading(digest.digest(), is_cut, reader.means_nothing(label.ids)))
    return [text.ids for text in filled], readings


def label_notices(labels: Sequence[str], readings: Sequence[LabelReading], context: int) -> tuple[LabelNotice, ...]:
    """What there is to say of labels; nothing of most. context: most tokens of a text."""
    pairs, notices = list(dict(zip(labels, readings, strict=True)).items()), []
    if cut := [label for label, reading in pairs if reading.is_cut]:
        verb = "is" if len(cut) == 1 else "are"
        says = (
            f"{_named(cut)} {verb} cut: this CLIP reads only {context} tokens of a text. Shorten the label or its "
            f"template."
        )
        notices.append(_notice("labels_cut", says, cut))
    groups: dict[bytes, list[str]] = {}
    for label, reading in pairs:
        groups.setdefault(reading.tokens, []).append(label)
    same = [group for group in groups.values() if len(group) > 1]
    for group in same[:GROUPS]:
        says = f"{_named(group)} are the same text to this CLIP, so their order means nothing. Keep one of them."
        notices.append(_notice("labels_same", says, group))
    if rest := [label for group in same[GROUPS:] for label in group]:
        more = len(same) - GROUPS
        says = (
            f"{_named(rest)} are in {more:,} more {'groups' if more > 1 else 'group'} of labels that are the same text."
        )
        notices.append(_notice("labels_same", says, rest))
    if unknown := [label for label, reading in pairs if reading.is_unknown]:
        says = f"This CLIP's vocabulary has nothing for {_named(unknown)}, so the logit says nothing about "
        notices.append(_notice("labels_unknown", f"{says}the meaning. Use other words.", unknown))
    return tuple(notices)


def notices_of(reader: TextReader, labels: Sequence[str], templates: Sequence[str]) -> tuple[LabelNotice, ...]:
    """The same for labels that nobody has read yet."""
    _, readings = label_readings(reader, reader.read(label_texts(labels, templates)), templates)
    return label_notices(labels, readings, reader.context)


def _notice(code: str, message: str, labels: list[str]) -> LabelNotice:
    return LabelNotice(code, message, tuple(labels[:LISTED]))


def _named(labels: Sequence[str]) -> str:
    named = [f'"{_short(label)}"' for label in labels[:NAMED]]
    if len(labels) > NAMED:
        named.append(f"{len(labels) - NAMED:,} more")
    return " and ".join([", ".join(named[:-1]), named[-1]]) if len(named) > 1 else named[0]


def _short(label: str) -> str:
    """A label's start and end, on one line: it is shown in terminals, too."""
    if len(label) > START + END:
        label = f"{label[:START]}…{label[-END:]}"
    return "".join(character if character.isprintable() else "\ufffd" for character in label)
