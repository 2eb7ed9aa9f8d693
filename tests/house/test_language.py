"""Texts that a user meets are in plain technical English: turns that engineers had to translate do not come back."""

import ast
import re

import pytest

from common import ROOT

PHRASES = re.compile(
    r"\b(?:(?<!there )(?:is|are) no(?= [a-z`{]|$)(?! (?:longer|better|more|less))"  # is not a
    r"|(?:is|are) none of"
    r"|(?:take|takes|taken|taking|took) up\b(?! to)"
    r"|mend|mends|mended|so many|shared out|anew|rivals?|besides|in vain|whence|thereof|nought|till"
    r"|stood in the way|lies beside|told apart|tell apart|held fast|if need be|not all there|for want of|in hand)\b",
    re.IGNORECASE,
)
ROOMS = ("models", "service", "training", "vitrine", "loadtests", "deploy")
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*"), *(path for room in ROOMS for path in (ROOT / room).rglob("*")))
    if path.is_file()
)
CODE = [name for name in FILES if name.endswith(".py")]
TEXTS = [name for name in FILES if name.endswith((".md", ".js", ".html", ".j2", ".toml", ".yaml", ".yml", "Makefile"))]
LEFT = ("models/demo/",)  # written when the bundle was


def strings(path):
    """(line, text) of every string that is no docstring: what is printed, sent or raised."""
    tree = ast.parse((ROOT / path).read_text())
    described = {
        id(body[0].value)
        for node in ast.walk(tree)
        if isinstance(body := getattr(node, "body", None), list) and body and isinstance(body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
            yield node.lineno, node.value


@pytest.mark.parametrize("room", sorted({name.partition("/")[0] for name in CODE}))
def test_strings_of_the_code(room):
    found = [
        f"{path}:{line}: {match[0]!r} in {text[:100]!r}"
        for path in CODE
        if path.startswith(f"{room}/") and not path.startswith(LEFT)
        for line, text in strings(path)
        if (match := PHRASES.search(text))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", [name for name in TEXTS if not name.startswith(LEFT)])
def test_documents_page_and_settings(path):
    lines = (ROOT / path).read_text().splitlines()
    found = [
        f"{path}:{number}: {match[0]!r}" for number, line in enumerate(lines, 1) if (match := PHRASES.search(line))
    ]
    assert not found, "\n".join(found)
