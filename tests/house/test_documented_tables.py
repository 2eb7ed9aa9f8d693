"""The documents' tables of fields, columns, codes and metrics have what the code has, no more and no less."""

import re

import pytest

from common import ROOT
from documents import table
from vitrine.models.images import decode
from vitrine.service.answers.notices import UNLIKE
from vitrine.service.errors import STATUS
from vitrine.service.offline.bulk.tables import row_types
from vitrine.service.operations import metrics
from vitrine.service.schemas.attribute import AttributeRequest, Explain

README = (ROOT / "service" / "README.md").read_text()


def codes(cell):
    return re.findall(r"`([a-z_]+)`", re.sub(r"\([^)]*\)", "", cell))


def test_request_fields_and_their_defaults():
    shown = {
        name.strip("`"): default.strip("`")
        for name, default, _ in table("service/README.md", "field", "default", "meaning")
    }
    expected = {}
    for prefix, model in (("", AttributeRequest), ("explain.", Explain)):
        for name, field in model.model_fields.items():
            if name != "explain":
                expected[prefix + name] = field.default
    assert shown.keys() == expected.keys()
    for name, default in expected.items():
        if default is not None:  # where it is None the table says in words what is taken instead
            assert shown[name] == str(default).lower(), name
        else:
            assert shown[name] not in ("true", "false"), name


def test_columns_of_bulk():
    shown = [name for cell, _ in table("service/README.md", "column", "what") for name in re.findall(r"`(\w+)`", cell)]
    assert set(shown) == set(row_types(with_sources=True, with_edit=True, columns=2))


def test_codes_of_errors_with_their_status():
    rows = [(re.findall(r"\d+", status), codes(cell)) for status, cell in table("service/README.md", "status", "codes")]
    shown = {code: statuses for statuses, all_of_them in rows for code in all_of_them}
    assert shown.keys() == STATUS.keys()
    assert not {code for code, statuses in shown.items() if str(STATUS[code]) not in statuses}


def test_codes_of_warnings():
    shown = {
        code
        for about in ("labels", "image")
        for row in table("service/README.md", "code", f"the {about}", "consequence")
        for code in codes(row[0])
    }
    of_labels = set(re.findall(r'"(labels_\w+)"', (ROOT / "models/texts/labels.py").read_text()))
    assert shown == {decode.TRANSPARENT, decode.REDUCED, decode.WITHOUT_END, UNLIKE} | of_labels


def test_metrics():
    paragraphs = re.search(r"^\*\*Metrics\*\*.*?(?=^\*\*Logs)", README, flags=re.MULTILINE | re.DOTALL)[0]
    shown = set(re.findall(r"`(\w+)`", paragraphs))
    named = {
        metric._name.removeprefix("vitrine_") + ("_total" if metric._type == "counter" else "")
        for metric in vars(metrics).values()
        if hasattr(metric, "_labelnames")
    }
    limits = {name for name in named if name.endswith(("_limit", "_max_seconds"))}  # `…_limit` beside the others
    assert named - limits <= shown
    assert {name for name in shown if re.search("_(total|seconds|bytes|images|info|share|r2)$", name)} <= named
    for name in limits:
        short = re.sub("_limit$|_max_seconds$", "", name)
        assert any(other.startswith(short) for other in shown), name


@pytest.mark.parametrize("path", ["service/README.md", "README.md"])
def test_options_that_are_named_exist(path):
    """`explain.x` anywhere in a text."""
    named = set(re.findall(r"`explain\.(\w+)", (ROOT / path).read_text()))
    assert named <= Explain.model_fields.keys()
