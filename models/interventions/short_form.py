"""Interventions in a few words, as they are typed on a command line.

    ablate 7/123           the feature 123 of layer 7, everywhere (with `cls`, `patches`: there)
    ablate 7/123 mean      the average picture's activation instead of it
    scale 7/123 2          twice its activation; set 7/123 1.5: this activation
    project 7/123          its direction taken out of the stream; with `encoder`: the direction that it reads
    ablate residual 7/123  of the residual SAEs
    ablate attention 5     a row of the ledger: attention, mlp, clt with their layer, prior, bias, error without
    scale head 5/3 0.5     a head: layer and head

Or the JSON object of `models.interventions.spec.Intervention`.
"""

from __future__ import annotations

import json
import re
from typing import Any, get_args

from pydantic import ValidationError

from vitrine.models.interventions.changes import InterventionError
from vitrine.models.interventions.spec import ROWS_OF_A_LAYER, Intervention, Op, Row

WORDS: dict[str, tuple[str, Any]] = {
    "all": ("tokens", "all"),
    "cls": ("tokens", "cls"),
    "patches": ("tokens", "patches"),
    "mean": ("to", "mean"),
    "encoder": ("direction", "encoder"),
}


def parse(text: str) -> Intervention:
    """Raises `InterventionError` that says what was not understood."""
    try:
        fields = json.loads(text) if text.lstrip().startswith("{") else _fields(text.split())
        return Intervention.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
    except ValueError as error:  # of JSON, too
        problem = str(error)
    raise InterventionError(f"{text!r}: {problem}; write for example 'ablate 7/123', 'scale attention 5 0.5'")


def _fields(words: list[str]) -> dict[str, Any]:
    """Raises `ValueError`."""
    if len(words) < 2 or words[0] not in get_args(Op):
        raise ValueError(f"begin with one of {', '.join(get_args(Op))}, and then what to change")
    op, *rest = words
    fields: dict[str, Any] = {"op": op} | _thing(rest)
    for word in rest:
        if word in WORDS:
            name, value = WORDS[word]
        elif "value" not in fields:
            name, value = "value", float(word)
        else:
            raise ValueError(f"{word!r} is not expected")
        fields[name] = value
    return fields


def _thing(words: list[str]) -> dict[str, Any]:
    """What is changed, which is taken from `words`. Raises `ValueError`."""
    first = words.pop(0)
    if first in get_args(Row):
        return {"row": first} | ({"layer": _numbers(words, 1)[0]} if first in ROWS_OF_A_LAYER else {})
    if first == "head":
        layer, head = _numbers(words, 2)
        return {"layer": layer, "head": head}
    if first == "residual":
        layer, index = _numbers(words, 2)
        return {"dictionary": "residual", "layer": layer, "index": index}
    layer, index = _numbers([first, *words], 2)
    return {"layer": layer, "index": index}


def _numbers(words: list[str], count: int) -> list[int]:
    """The first word, `count` numbers with / between them, which is taken from `words`."""
    word = words.pop(0) if words else ""
    if not re.fullmatch("/".join(["[0-9]{1,9}"] * count), word):
        raise ValueError(f"{word!r} is not {'LAYER/NUMBER' if count == 2 else 'a layer'}")
    return [int(number) for number in word.split("/")]
