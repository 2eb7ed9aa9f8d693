"""Errors that are printed to users have one form: lower case, no full stop, short, no talk of errors. And numbers."""

import ast

import pytest
from test_rooms import MODULES

NAMES = ("BENTOML_HOME", "CLIP ", "CLT", "Content-Encoding", "DuckDB", "MLPs", "ONNX Runtime", "Ray", "VITRINE_")
NAMES += ("VisionTransformer", "Weights &")
LONGEST = 300  # characters, without what is filled in


def text(node):
    """What a message says, with {} for what is filled in; None if it is made elsewhere."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return (text(left) or "{}") + (text(right) or "{}")
    return None


def classes():
    """Names of `VitrineError` and of all that are derived from it."""
    bases = {}
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
    found = {"VitrineError"}
    while more := {name for name, of in bases.items() if of & found} - found:
        found |= more
    return found


def messages():
    ours = classes()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                name, arguments = node.exc.func.id, [text(argument) for argument in node.exc.args]
                said = [one for one in arguments[:2] if one and " " in one]
                if name in ours and said:
                    yield f"{module}:{node.lineno}", said[0]


def wrong(message):
    """What the form forbids in a message."""
    if message[:1].isupper() and not message.startswith(NAMES):
        yield "begins with a capital"
    if message.rstrip().endswith((".", "!")):
        yield "ends with a full stop"
    if len(message) > LONGEST:
        yield f"has {len(message)} characters"
    if any(word in message.lower().split() for word in ("error", "please", "sorry", "invalid", "failed")):
        yield "speaks of errors, or begs pardon, rather than of what is wrong"


def test_messages_have_one_form():
    found = dict(messages())
    assert len(found) > 300
    assert not {f"{where}: {problem}: {said}" for where, said in found.items() for problem in wrong(said)}


@pytest.mark.parametrize("message", ["An image is broken", "it is broken.", "x " * 200, "an error", "please send it"])
def test_the_form_forbids(message):
    assert list(wrong(message))


def test_numbers_have_one_minus_sign():
    """The hyphen, which every program reads as a minus sign; "−" is for formulas, and for the page."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant) and (said := text(node)):
                assert "−{" not in said, f"{module}, line {node.lineno}"
                assert said != "−", f"{module}, line {node.lineno}"
